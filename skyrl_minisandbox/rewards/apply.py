"""Applying a patch inside a fresh sandbox of the task's image, whole or not at all.

Everything in a patch is its author's doing, so a patch that does not go in is a value (`Applied.ok` false, with the
file, the hunk and the reason). Only when git could not be run at all, before anything of the patch was read, is it ours
(`Applied.started` false).

git works with a repository of our own beside the image's: no configuration, hook, filter or attribute of the image has
a say, and bytes stay as the patch has them. Only a patch that does not fit so is tried once more as the image's own
repository would take it: one that git made has the line ends of the repository, not those of the checked-out file.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import secrets
from collections.abc import Iterable, Sequence

from skyrl_minisandbox.rewards.hunks import explain, files, safe
from skyrl_minisandbox.rewards.lenient import PATCH, Way, lenient_ways
from skyrl_minisandbox.sandbox import CommandResult, Sandbox

GIT = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "safe.directory=*")
"""Nothing that a repository's configuration names is run."""

GIT_ENV = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C.UTF-8",
}

GIT_TIMEOUT = 120.0
"""Seconds for one git command."""

OWN_REPOSITORY = r"""
# $repo: a directory that is not there. It becomes a repository without configuration, beside that of the image. Its
# attributes go before those of any .gitattributes (gitattributes(5)).
own_repository() {
  mkdir -p "$repo/objects/info" "$repo/refs" "$repo/info" && printf 'ref: refs/heads/none\n' >"$repo/HEAD" &&
    printf '%s\n' '[core]' 'repositoryformatversion = 0' 'bare = false' 'protectNTFS = false' 'protectHFS = false' \
      'attributesFile = /dev/null' 'excludesFile = /dev/null' >"$repo/config" &&
    printf '* -text -ident -filter !eol !working-tree-encoding !diff\n' >"$repo/info/attributes"
}
"""

# $1: where our repository goes. $2: `own`, or `image` for the image's. The rest: options of `git apply`.
_APPLY = (
    OWN_REPOSITORY
    + r"""
repo=$1 whose=$2; shift 2
trap 'rm -rf -- "$repo"' EXIT
if [[ $whose = own ]]; then own_repository && export GIT_DIR=$repo GIT_WORK_TREE=$PWD || exit 126; fi
git=(git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c 'safe.directory=*')
echo ready
"${git[@]}" apply --whitespace=nowarn "$@" -
"""
)

# $2: a file with the paths that the patch touches, each ended by NUL. What does not merge leaves everything as it was.
_THREE_WAY = (
    OWN_REPOSITORY
    + r"""
repo=$1 paths=$2
trap 'rm -rf -- "$repo" "$paths"' EXIT
objects=$(git -c 'safe.directory=*' rev-parse --git-path objects) && objects=$(cd "$objects" && pwd) &&
  own_repository && printf '%s\n' "$objects" >"$repo/objects/info/alternates" &&
  export GIT_DIR=$repo GIT_WORK_TREE=$PWD && git rev-parse --git-dir >/dev/null || exit 126
echo ready
git update-index -z --add --remove --stdin <"$paths" && touch "$repo/index" && cp "$repo/index" "$repo/before" || exit 1
git apply --3way --whitespace=nowarn -
status=$?
if [[ $status != 0 ]]; then
  git ls-files -z | xargs -0 -r rm -f --
  GIT_INDEX_FILE=$repo/before git checkout-index -q -f -a
fi
exit "$status"
"""
)

_READY = b"ready\n"
_CONFLICT = re.compile(r"^Applied patch to (?:'(.*)') with conflicts", re.MULTILINE)
_LARGEST_SHOWN = 4 << 20  # bytes of a file that is looked into to say why a hunk does not fit


@dataclasses.dataclass(frozen=True)
class Applied:
    """What became of a patch.

    ok: every hunk is in. Otherwise `error` says in one line which file and hunk, and why.
    started: git ran at all; false is a damaged image or sandbox, never the patch's doing.
    log: what git printed, and what was tried.
    used: how it went in, when not as it stands: the way of `fuzzy` or `three_way`.
    """

    ok: bool
    started: bool
    error: str
    log: str
    used: str = ""


def apply_patch(sandbox: Sandbox, patch: str, workdir: str, how: str = "strict") -> Applied:
    """Apply `patch` to the files below `workdir`; git refuses paths outside of it and below `.git`.

    patch: text; bytes that are not UTF-8 are surrogate escapes. A missing last newline is added.
    how: `strict`: as `git apply` does: hunks may have moved, their lines may not differ. `fuzzy`: see `lenient.py`.
        `three_way`: where it does not fit, merged with the blobs that it names, if the image has them.

    A submodule's commit is not brought: the line that names it is taken, its files stay.

    Raises `SandboxGone` when the sandbox dies meanwhile.
    """
    text = patch if patch.endswith("\n") else patch + "\n"
    if "\nGIT binary patch\n" in text and not text.endswith("\n\n"):
        text += "\n"  # the empty line that ends a binary hunk; a scaffold may have stripped it
    if outside := _copied_from_outside(text):
        return Applied(ok=False, started=True, error=f"invalid path '{outside}'", log="")
    first = _git_apply(sandbox, text, workdir, "own")
    # Git that ran out of time, memory or disk does so again.
    if first.exit_code == 0 or not _started(first) or first.timed_out or first.oom_killed or first.disk_full:
        return _applied(first)
    read = _Reader(sandbox, workdir)
    failed = _applied(first, explain(text, _errors(first), read))  # before anything else is tried
    ways = [Way("as the image's own repository takes it", text, program="image")]
    if how == "three_way":
        ways.append(Way("merged with the blobs that it names", text, program="merge"))
    elif how == "fuzzy":
        ways += lenient_ways(text, read)
    log = _text(first)
    for way in ways:
        result = _try(sandbox, way, workdir)
        log += f"{way.name}:\n{_text(result)}"
        if result.exit_code == 0:
            return Applied(ok=True, started=True, error="", log=log, used=way.name)
    if conflicts := _CONFLICT.findall(log):
        failed = dataclasses.replace(failed, error=f"{failed.error}; the merge of {conflicts[0]} has conflicts")
    return dataclasses.replace(failed, log=log)


def _copied_from_outside(text: str) -> str:
    """The first file outside of the workdir that the patch copies, which git 2.39 lets it; mostly ""."""
    if "\ncopy from " not in text:
        return ""
    sources = (line for file in files(text) for line in file.more if line.startswith("copy from "))
    return next((name for line in sources if not safe(name := line.removeprefix("copy from "))), "")


def _git_apply(sandbox: Sandbox, text: str, workdir: str, whose: str, options: Sequence[str] = ()) -> CommandResult:
    return _script(sandbox, _APPLY, text, workdir, whose, *options)


def _try(sandbox: Sandbox, way: Way, workdir: str) -> CommandResult:
    if way.program in ("own", "image"):
        return _git_apply(sandbox, way.patch, workdir, way.program, way.options)
    if way.program == "patch":
        return _script(sandbox, PATCH, way.patch, workdir, *way.options)
    touched = {name for file in files(way.patch) for name in file.touched() if safe(name)}
    paths = f"/tmp/{secrets.token_hex(8)}"
    try:
        sandbox.write_file(paths, nul_list(sorted(touched)))
    except OSError as error:  # no room for the names of all its files
        return CommandResult(stdout=b"", stderr=b"", exit_code=1, merged=f"error: {error.strerror}\n".encode())
    return _script(sandbox, _THREE_WAY, way.patch, workdir, paths)


def _script(sandbox: Sandbox, script: str, text: str, workdir: str, *arguments: str) -> CommandResult:
    return sandbox.run(
        ["bash", "-c", script, "apply", f"/tmp/{secrets.token_hex(8)}", *arguments],
        input=as_bytes(text),
        cwd=workdir,
        env=GIT_ENV,
        timeout=GIT_TIMEOUT,
    )


class _Reader:
    """Bytes of a file below the workdir, None for what is none or is too large to be looked into."""

    def __init__(self, sandbox: Sandbox, workdir: str) -> None:
        self._sandbox, self._workdir = sandbox, workdir

    def __call__(self, path: str) -> bytes | None:
        if not safe(path):
            return None
        try:
            return self._sandbox.read_file(posixpath.join(self._workdir, path), limit=_LARGEST_SHOWN)
        except OSError:
            return None


def _started(result: CommandResult) -> bool:
    """Whether git ran; before, nothing but the image and the machine can be the reason of a failure."""
    ran = result.stdout.startswith(_READY) and result.exit_code not in (126, 127)
    return ran or result.oom_killed or result.disk_full


def _applied(result: CommandResult, error: str = "") -> Applied:
    ok = result.exit_code == 0
    return Applied(ok, _started(result), "" if ok else error or git_error(result), _text(result))


def _text(result: CommandResult) -> str:
    return result.output.removeprefix(_READY.decode())


def as_bytes(text: str) -> bytes:
    """The bytes of a patch. Half a surrogate pair, which no file has, becomes a question mark."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def nul_list(names: Iterable[str]) -> bytes:
    """Names as git, find and xargs take them with `-z` or `-0`: each ended by NUL."""
    return b"".join(as_bytes(name) + b"\0" for name in names)


def _errors(result: CommandResult) -> list[str]:
    """What git complains of, a line each."""
    lines = [line.strip() for line in _text(result).splitlines() if line.strip()]
    errors = [re.sub("^(error|fatal): ", "", line) for line in lines if line.startswith(("error:", "fatal:"))]
    return errors or lines


def git_error(result: CommandResult) -> str:
    """Why a git command failed, in one line."""
    if result.timed_out:
        return f"git did not end within {GIT_TIMEOUT:.0f} s"
    if result.disk_full:
        return "the disk of the sandbox is full"
    if result.oom_killed:
        return "git was killed for memory"
    text = "; ".join(_errors(result)[:3]) or f"git ended with status {result.exit_code}"
    return text[:500]
