"""The patch of a rollout, computed by us from what the agent's sandbox wrote.

The agent's git never runs for us: its `.git` (index, hooks, configuration, commits) may say anything. We take the
frozen upper of its sandbox and lay the files of it over the image in a *fresh* sandbox, where git compares them with
the image's, in a repository of our own: no attribute, filter, hook or configuration has a say, and bytes stay bytes.
The image's repository only tells which files are tracked. Files that its .gitignore (or the agent's) names and that are
not tracked are left out, as `git add -A` leaves them out; a submodule or a repository inside is taken as its files.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import itertools
import os
import posixpath
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.rewards.agent_tree import AgentTree, read_tree, write_files
from skyrl_minisandbox.rewards.apply import GIT_ENV, OWN_REPOSITORY, nul_list
from skyrl_minisandbox.sandbox import Sandbox

LARGEST_PATCH = 32 << 20
"""Bytes. A larger one is no fix; see `take_patch`."""

LARGEST_TREE = 1 << 30
"""Bytes of everything that differs below the workdir; a sparse file counts with its full size."""

MOST_MEMBERS = 200_000
"""Files and directories that differ below the workdir. A million of them would take minutes, which are nobody's
limit but the driver's, and what runs into that is not scored."""

_SPOOL = 16 << 20
_LARGEST_LIST = 64 << 20
_LARGEST_IGNORE = 1 << 20  # bytes of a .gitignore that is heeded
_TIMEOUT = 300.0

# What Python and its test runners leave behind, ignored whatever the repository says.
_IGNORED = b"__pycache__/\n*.py[co]\n.pytest_cache/\n.hypothesis/\n"

# $1: our repository, with the lists `paths` (gone and new ones), `directories` and `new`, NUL after each name. $2:
# `cleared` when the work tree was emptied. Makes `before` (an index with the image's files at those paths), `had`
# (their names), `kept` (of had and new, what is not ignored), `tracked` (of kept, what HEAD has); removes what is gone.
_BEFORE = (
    OWN_REPOSITORY
    + r"""
set -uo pipefail
repo=$1
image=(git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c 'safe.directory=*')
head=$("${image[@]}" rev-parse 'HEAD^{tree}') && objects=$("${image[@]}" rev-parse --git-path objects) || exit 1
exclude=$("${image[@]}" rev-parse --git-path info/exclude)
own_repository && (cd "$objects" && pwd) >"$repo/objects/info/alternates" || exit 1
{ cat -- "$repo/ignored"; cat -- "$exclude" 2>/dev/null; } >"$repo/info/exclude"
export GIT_DIR=$repo GIT_WORK_TREE=$PWD
git ls-tree -r -z --full-tree "$head" | sed -z -n '/^160000/!s/^[^\t]*\t//p' | sort -zu >"$repo/names" || exit 1

# Of the names in a file, those that are not tracked and that a .gitignore names. `./`: git reads no magic into them.
ignored() {
  comm -z -23 "$1" "$repo/names" | sed -z 's,^,./,' |
    { GIT_LITERAL_PATHSPECS=0 git check-ignore -z --no-index --stdin || [[ $? = 1 ]]; } | sed -z 's,^\./,,' | sort -zu
}

# Both run `find` on names that need not exist; a directory that takes the place of a link or a file comes first.
shallow='find "$@" -maxdepth 0 ! -type d -print0 2>/dev/null; true'
deep='find "$@" -iname .git -prune -o "(" -type f -o -type l ")" -print0 2>/dev/null; true'
xargs -0 -r sh -c "$shallow" - <"$repo/directories" >"$repo/replaced"
GIT_INDEX_FILE=$repo/before git update-index -z --add --remove --stdin <"$repo/replaced" &&
  xargs -0 -r rm -f -- <"$repo/replaced" || exit 1
if [[ $2 = cleared ]]; then
  sh -c "$deep" - .
else
  xargs -0 -r sh -c "$deep" - <"$repo/paths"
fi >"$repo/found"
GIT_INDEX_FILE=$repo/before git update-index -z --add --remove --stdin <"$repo/found" || exit 1
cat "$repo/replaced" "$repo/found" | sed -z 's,^\./,,' | sort -zu >"$repo/had"
ignored "$repo/had" >"$repo/had.ignored" || exit 1
if [[ $2 = cleared ]]; then
  find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf -- {} + || exit 1
else
  xargs -0 -r rm -rf -- <"$repo/paths" || exit 1
fi
[[ ! -d $repo/ignores ]] || cp -r "$repo/ignores/." . || exit 1
ignored "$repo/new" >"$repo/new.ignored" || exit 1
{ comm -z -23 "$repo/had" "$repo/had.ignored"; comm -z -23 "$repo/new" "$repo/new.ignored"; } | sort -zu >"$repo/kept"
comm -z -12 "$repo/kept" "$repo/names" >"$repo/tracked"
"""
)

# $1: our repository, with `only`: the paths to compare. Writes `patch`.
_AFTER = r"""
set -uo pipefail
repo=$1
rm -rf -- "$repo/after" "$repo/written" && mkdir "$repo/written" || exit 1
export GIT_DIR=$repo GIT_WORK_TREE=$PWD GIT_OBJECT_DIRECTORY=$repo/written
export GIT_ALTERNATE_OBJECT_DIRECTORIES=$repo/objects
comm -z -23 "$repo/had" "$repo/only" | GIT_INDEX_FILE=$repo/before git update-index -z --force-remove --stdin &&
  comm -z -12 "$repo/new" "$repo/only" | GIT_INDEX_FILE=$repo/after git update-index -z --add --remove --stdin &&
  before=$(GIT_INDEX_FILE=$repo/before git write-tree) && after=$(GIT_INDEX_FILE=$repo/after git write-tree) || exit 1
git diff-tree -r -p --binary --full-index --no-renames --no-color --no-ext-diff --no-textconv \
  --src-prefix=a/ --dst-prefix=b/ "--output=$repo/patch" "$before" "$after"
"""


@dataclasses.dataclass(frozen=True)
class Taken:
    """patch: a binary-safe unified diff against the image. left_out: in a line, what is not in it and why; or ""."""

    patch: str
    left_out: str = ""


def patch_from_upper(agent_sandbox: Sandbox, open_sandbox: Callable[[], Sandbox], workdir: str) -> str:
    """The patch of `take_patch`."""
    return take_patch(agent_sandbox, open_sandbox, workdir).patch


def take_patch(agent_sandbox: Sandbox, open_sandbox: Callable[[], Sandbox], workdir: str) -> Taken:
    """What the agent changed below `workdir`, compared with the image.

    agent_sandbox: frozen by this (`export_layer`): nothing of the agent runs afterwards.
    open_sandbox: makes a fresh sandbox of the same image.

    Names and contents that are not UTF-8 come as surrogate escapes, which `apply_patch` turns back. When the diff would
    be larger than `LARGEST_PATCH`, untracked files are taken smallest first, as many as fit; none of them when that
    does not help. When that is too large as well, or the tree is larger than `LARGEST_TREE` or `MOST_MEMBERS`, or than
    the sandbox's disk, the patch is empty: what the agent wrote is a value, never an exception.

    Raises `StoreError` when the image's own repository cannot be compared.
    """
    prefix = workdir.strip("/")
    with tempfile.SpooledTemporaryFile(_SPOOL) as layer:
        try:
            agent_sandbox.export_layer(layer, prefix=prefix, max_bytes=LARGEST_TREE, max_members=MOST_MEMBERS)
        except OSError as error:
            if error.errno == errno.EFBIG:
                most = f"{LARGEST_TREE >> 20} MiB or {MOST_MEMBERS} files"
                return Taken("", f"everything: what differs from the image has more than {most}")
            raise
        layer.seek(0)
        tree = read_tree(layer, prefix)
        if not (tree.files or tree.gone or tree.cleared):
            return Taken("")
        try:
            with open_sandbox() as sandbox:
                taken = _Comparison(sandbox, workdir, tree).take(layer)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            taken = Taken("", "everything: the disk of a sandbox does not hold it")
    if not taken.patch and taken.left_out:
        with open_sandbox() as sandbox:  # whose fault is it? The one probe: the same without the agent's tree
            probe = _Comparison(sandbox, workdir, AgentTree())
            if not probe.prepare() or probe.compare([]) is None:
                raise StoreError(f"the image is damaged on this node: its own repository {workdir} cannot be compared")
    return taken


class _Comparison:
    """One fresh sandbox of the image, in which an agent's tree is compared with the image's."""

    def __init__(self, sandbox: Sandbox, workdir: str, tree: AgentTree) -> None:
        self._sandbox, self._workdir, self._tree = sandbox, workdir, tree
        self._repository = f"/tmp/{secrets.token_hex(8)}"

    def take(self, layer: IO[bytes]) -> Taken:
        """The patch. layer: what the tree was read from."""
        ignores = [path for path, size in self._tree.files.items() if _is_ignore_file(path) and size <= _LARGEST_IGNORE]
        if ignores:
            directory = f"{self._repository}/ignores"
            self._sandbox.run(["mkdir", "-p", directory], cwd="/", timeout=_TIMEOUT)
            if not self._unpack(layer, ignores, directory):
                return Taken("", "everything: the disk of a sandbox does not hold it")
        if not self.prepare():
            return Taken("", "everything: the names of its files cannot be compared")
        kept, tracked = self._list("kept"), set(self._list("tracked"))
        if ignored := self._list("had.ignored"):
            kept += _in_the_way(ignored, [path for path in kept if path in self._tree.files])
        there = False
        for limit in (LARGEST_PATCH, LARGEST_PATCH // 2, 0):
            chosen, left_out = self._choose(kept, tracked, limit)
            there = there or self._unpack(layer, [path for path in chosen if path in self._tree.files], self._workdir)
            patch = self.compare(chosen) if there else None
            if patch is not None:
                return Taken(patch.decode("utf-8", "surrogateescape"), left_out)
        return Taken("", f"everything: the patch would have more than {LARGEST_PATCH >> 20} MiB")

    def prepare(self) -> bool:
        """Make our repository, note what the image has where the agent's tree differs, and remove it."""
        tree = self._tree
        self._write("ignored", _IGNORED)
        self._write("paths", nul_list(f"./{path}" for path in tree.gone))
        self._write("directories", nul_list(f"./{path}" for path in tree.directories))
        self._write("new", nul_list(sorted(tree.files, key=os.fsencode)))
        return self._script(_BEFORE, "cleared" if tree.cleared else "kept")

    def compare(self, chosen: Iterable[str]) -> bytes | None:
        """The diff of these paths, None when it cannot be had or is too large."""
        self._write("only", nul_list(sorted(chosen, key=os.fsencode)))
        if not self._script(_AFTER):
            return None
        try:
            return self._sandbox.read_file(f"{self._repository}/patch", limit=LARGEST_PATCH)
        except OSError:
            return None

    def _choose(self, kept: list[str], tracked: set[str], limit: int) -> tuple[list[str], str]:
        """What of `kept` is compared, with `limit` bytes of untracked files, and what that leaves out."""
        size = self._tree.files
        untracked = sorted((path for path in kept if path in size and path not in tracked), key=lambda path: size[path])
        sums = list(itertools.accumulate(size[path] for path in untracked))
        out = untracked[bisect.bisect_right(sums, limit) :]
        if not out:
            return kept, ""
        much = sum(size[path] for path in out)
        without = set(out)
        plural = "s" if len(out) > 1 else ""
        told = f"{len(out)} untracked file{plural} of {much >> 10} KiB, the largest {out[-1]!r}: a patch has at most"
        return [path for path in kept if path not in without], f"{told} {LARGEST_PATCH >> 20} MiB"

    def _unpack(self, layer: IO[bytes], paths: list[str], directory: str) -> bool:
        """Bring files of the agent's tree into the sandbox."""
        if not paths:
            return True
        with tempfile.SpooledTemporaryFile(_SPOOL) as files:
            layer.seek(0)
            write_files(layer, files, self._tree, paths, self._workdir.strip("/"))
            files.seek(0)
            untar = ["tar", "-x", "-m", "--no-same-owner", "-f", "-", "-C", directory]
            return self._sandbox.run(untar, input=files, cwd="/", timeout=_TIMEOUT).exit_code == 0

    def _script(self, script: str, *arguments: str) -> bool:
        argv = ["bash", "-c", script, "patch", self._repository, *arguments]
        result = self._sandbox.run(argv, cwd=self._workdir, env=GIT_ENV, timeout=_TIMEOUT)
        return result.exit_code == 0

    def _write(self, name: str, data: bytes) -> None:
        self._sandbox.write_file(f"{self._repository}/{name}", data)

    def _list(self, name: str) -> list[str]:
        data = self._sandbox.read_file(f"{self._repository}/{name}", limit=_LARGEST_LIST)
        return [os.fsdecode(path) for path in data.split(b"\0")[:-1]]


def _in_the_way(had: list[str], new: list[str]) -> list[str]:
    """Those of the image's ignored files that must go, because a new file has their directory's name or the reverse."""
    files, above = set(new), {parent for path in new for parent in _parents(path)}
    return [path for path in had if path in above or any(parent in files for parent in _parents(path))]


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def _is_ignore_file(path: str) -> bool:
    return posixpath.basename(path) == ".gitignore"
