"""Putting back what the tests need as the image has it, and bringing the hidden ones.

The image's own content comes from a second, fresh sandbox, which is only made when the patch touched something that
steers the runner (`steering.py`).
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
from collections.abc import Callable, Collection, Iterator

from skyrl_minisandbox.errors import SandboxError, SandboxGone, TaskError
from skyrl_minisandbox.rewards.apply import GIT_ENV, GIT_TIMEOUT, apply_patch, nul_list
from skyrl_minisandbox.rewards.steering import Steering
from skyrl_minisandbox.sandbox import CommandResult, Sandbox
from skyrl_minisandbox.tasks.task import Task

MOST_CHANGES = 200_000
"""Paths that a patch may change before they are not looked at one by one any more."""

# Standard input: paths relative to the workdir, each ended by NUL. They become what HEAD has, or go where it has none.
# A parent that is no directory (or a link to somewhere) is the patch's doing: it goes, and git makes the directory
# anew.
_RESTORE = r"""
set -uo pipefail
export LC_ALL=C
git=(git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c 'safe.directory=*')
list=$(mktemp) && sort -zu >"$list" || exit 1
while IFS= read -r -d '' path; do
  parent=.
  rest=$path
  while [[ $rest == */* ]]; do
    parent=$parent/${rest%%/*}
    rest=${rest#*/}
    if [[ -L $parent || ( -e $parent && ! -d $parent ) ]]; then rm -rf -- "$parent" || exit 1; fi
  done
  rm -rf -- "./$path" || exit 1
done <"$list"
"${git[@]}" ls-tree -r -z --name-only --full-tree HEAD | sort -z | comm -z -12 "$list" - |
  xargs -0 -r "${git[@]}" checkout -q HEAD -- || exit 1
rm -f -- "$list"
"""

# The same paths in the image, those that it has beside its HEAD, as a tar on standard output.
_PACK = r"""
set -uo pipefail
export LC_ALL=C
list=$(mktemp) && git -c 'safe.directory=*' ls-tree -r -z --name-only --full-tree HEAD | sort -z >"$list" || exit 1
sort -zu | comm -z -23 - "$list" | while IFS= read -r -d '' path; do
  if [[ -L $path || -e $path ]]; then printf '%s\0' "./$path"; fi
done | tar -c --null --no-recursion -T - -f - --format=gnu
"""


class DoesNotGoIn(Exception):
    """A step failed in a sandbox with the patch in it; whose fault that is, `grade` asks the image."""


@contextlib.contextmanager
def no_patch_in(task: Task) -> Iterator[None]:
    """For what is done in a sandbox of the image as it is: one that dies there is ours. Raises `SandboxError` then."""
    try:
        yield
    except SandboxGone as error:
        raise SandboxError(f"the sandbox of task `{task.id}` died before any patch was in: {error}") from error


def restore_tests(task: Task, sandbox: Sandbox) -> None:
    """The task's test files as HEAD has them, and nothing else. Raises `DoesNotGoIn`."""
    _put_back(sandbox, task, task.tests.files)


def bring_tests(task: Task, sandbox: Sandbox) -> None:
    """The hidden tests, on top of the image's own files. Raises `DoesNotGoIn`."""
    if not task.tests.patch.strip():
        return
    applied = apply_patch(sandbox, task.tests.patch, task.recipe.workdir)
    if not applied.ok:
        raise DoesNotGoIn(applied.error)


def restore(
    task: Task, sandbox: Sandbox, open_sandbox: Callable[[], Sandbox], gold_files: Collection[str]
) -> tuple[str, ...]:
    """Put back the task's test files and what else steers the runner; returns those of the latter that the patch
    had touched, sorted.

    Raises `DoesNotGoIn` when that could not be done, `SandboxError` when no second sandbox can be had.
    """
    workdir = task.recipe.workdir.rstrip("/")
    try:
        changes = sandbox.changes(limit=MOST_CHANGES)
    except OSError as error:
        many = f"it changes more than {MOST_CHANGES} paths"
        raise DoesNotGoIn(many if error.errno == errno.EFBIG else f"what it changes cannot be told: {error}") from None
    found = {
        change.path.removeprefix(workdir + "/"): change.kind
        for change in changes
        if change.path.startswith(workdir + "/")
    }
    changed = {path: kind for path, kind in found.items() if path.split("/", 1)[0] != ".git"}
    if not changed:
        return ()
    with no_patch_in(task), _Image(open_sandbox, task) as image:
        steering = Steering(task.tests.kind, task.tests.command, task.tests.files, gold_files, image.is_package)
        touched = {path for path, kind in changed.items() if kind != "removed" and steering.steers(path)}
        # Of a directory that is gone, or that became something else, what steered in it.
        for path in [path for path, kind in changed.items() if kind == "removed" or path in touched]:
            touched |= {below for below in image.below(path) if steering.steers(below)}
        if not touched:
            return ()
        packed = image.run(["bash", "-c", _PACK], nul_list(sorted(touched)))
    if packed.exit_code != 0:
        raise SandboxError(f"the files of task `{task.id}` cannot be read from its image: {packed.stderr!r}")
    if packed.truncated:
        raise DoesNotGoIn("what the patch changed of files that steer the tests is too much to put back")
    _put_back(sandbox, task, touched)
    unpack = ["tar", "-x", "--no-same-owner", "-f", "-"]
    _must(sandbox.run(unpack, input=packed.stdout, cwd=workdir, timeout=GIT_TIMEOUT))
    return tuple(sorted(touched - set(task.tests.files)))


def _put_back(sandbox: Sandbox, task: Task, paths: Collection[str]) -> None:
    names, workdir = nul_list(sorted(paths)), task.recipe.workdir
    _must(sandbox.run(["bash", "-c", _RESTORE], input=names, cwd=workdir, env=GIT_ENV, timeout=GIT_TIMEOUT))


class _Image:
    """The task's image as it is, looked into by a sandbox that is made when first asked for."""

    def __init__(self, open_sandbox: Callable[[], Sandbox], task: Task) -> None:
        self._open, self._workdir = open_sandbox, task.recipe.workdir
        self._made: Sandbox | None = None

    def sandbox(self) -> Sandbox:
        if self._made is None:
            self._made = self._open()
        return self._made

    def is_package(self, directory: str) -> bool:
        if not directory:
            return False
        try:
            self.sandbox().read_file(posixpath.join(self._workdir, directory, "__init__.py"))
        except OSError:
            return False
        return True

    def run(self, command: list[str], given: bytes = b"") -> CommandResult:
        return self.sandbox().run(command, input=given, cwd=self._workdir, env=GIT_ENV, timeout=GIT_TIMEOUT)

    def below(self, path: str) -> list[str]:
        """Files and links of the image below a path, or the path itself; nothing where the image has none."""
        found = self.run(["find", f"./{path}", "!", "-type", "d", "-print0"])
        names = found.stdout.decode("utf-8", "surrogateescape").split("\0")
        return [name.removeprefix("./") for name in names if name]

    def __enter__(self) -> _Image:
        return self

    def __exit__(self, *_: object) -> None:
        if self._made is not None:
            self._made.close()


def tests_fit(task: Task, open_sandbox: Callable[[], Sandbox]) -> bool:
    """Whether the tests go in without the patch: the one probe that tells whose fault it is."""
    try:
        with no_patch_in(task), open_sandbox() as sandbox:
            bring_tests(task, sandbox)
    except DoesNotGoIn:
        return False
    return True


tests_fit.__test__ = False  # type: ignore[attr-defined]


def damaged(task: Task, error: object) -> TaskError:
    """The error for tests that do not fit the task's own image."""
    return TaskError(
        f"the test patch of task `{task.id}` does not fit its image: {error}",
        hint=f"minisandbox validate tasks.ids=[{task.id}]",
    )


def _must(done: CommandResult) -> None:
    if done.exit_code != 0 or done.timed_out:
        lines = [line.strip() for line in done.output.splitlines() if line.strip()]
        raise DoesNotGoIn("; ".join(lines[:3])[:500] or f"status {done.exit_code}")
