"""Applying a patch inside a fresh sandbox of the task's image, whole or not at all.

Everything in a patch is its author's doing, so a patch that does not go in is a value (`Applied.ok` false, with the
file, the hunk and the reason). Only when git could not be run at all, before anything of the patch was read, is it ours
(`Applied.started` false).
"""

from __future__ import annotations

import dataclasses

from skyrl_minisandbox.sandbox import CommandResult, Sandbox

GIT = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "safe.directory=*")
"""Nothing that a repository's configuration names is run."""

GIT_ENV = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C.UTF-8",
}

GIT_TIMEOUT = 120.0
"""Seconds for one git command."""


@dataclasses.dataclass(frozen=True)
class Applied:
    """What became of a patch.

    ok: every hunk is in. Otherwise `error` says in one line which file and hunk, and why.
    started: git ran at all; false is a damaged image or sandbox, never the patch's doing.
    log: what git printed.
    """

    ok: bool
    started: bool
    error: str
    log: str


def apply_patch(sandbox: Sandbox, patch: str, workdir: str, how: str = "strict") -> Applied:
    """Apply `patch` to the files below `workdir`; git refuses paths outside of it and below `.git`.

    patch: text; bytes that are not UTF-8 are surrogate escapes. A missing last newline is added.
    how: `strict`: as `git apply` does.

    Raises `SandboxGone` when the sandbox dies meanwhile.
    """
    text = patch if patch.endswith("\n") else patch + "\n"
    result = sandbox.run(
        [*GIT, "apply", "--whitespace=nowarn", "-"],
        input=as_bytes(text),
        cwd=workdir,
        env=GIT_ENV,
        timeout=GIT_TIMEOUT,
    )
    if result.exit_code == 0:
        return Applied(ok=True, started=True, error="", log=result.output)
    return Applied(ok=False, started=result.exit_code not in (126, 127), error=git_error(result), log=result.output)


def as_bytes(text: str) -> bytes:
    """The bytes of a patch. Half a surrogate pair, which no file has, becomes a question mark."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def git_error(result: CommandResult) -> str:
    """Why a git command failed, in one line."""
    if result.timed_out:
        return f"git did not end within {GIT_TIMEOUT:.0f} s"
    if result.disk_full:
        return "the disk of the sandbox is full"
    if result.oom_killed:
        return "git was killed for memory"
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith(("error:", "fatal:"))]
    text = "; ".join((errors or lines)[:3]) or f"git ended with status {result.exit_code}"
    return text[:500]
