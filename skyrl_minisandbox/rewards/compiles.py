"""Whether the Python files that a patch changes compile, for rewards that pay for it."""

from __future__ import annotations

from skyrl_minisandbox.rewards.apply import nul_list
from skyrl_minisandbox.rewards.hunks import files, safe
from skyrl_minisandbox.sandbox import Sandbox

TIMEOUT = 60.0
"""Seconds for all files together. A tenth of a second is usual; a file that takes a minute was made to."""

_COMPILED, _BROKEN, _NOTHING = 0, 4, 3

# Runs in the environment's own interpreter, from 3.6 on, without its site-packages and with nothing of the patch
# imported. stdin: paths relative to the workdir, each ended by NUL.
_PROGRAM = f"""
import os, stat, sys
seen = {_NOTHING}
for name in filter(None, sys.stdin.buffer.read().split(b"\\0")):
    try:
        if not stat.S_ISREG(os.lstat(name).st_mode):
            continue
        with open(name, "rb") as file:
            source = file.read()
    except OSError:  # the patch removes it
        continue
    try:
        compile(source, os.fsdecode(name), "exec", dont_inherit=True)
    except Exception as error:
        print("{{}}: {{}}".format(ascii(os.fsdecode(name)), ascii(error)))
        sys.exit({_BROKEN})
    seen = {_COMPILED}
sys.exit(seen)
"""

_SCRIPT = f"""
python=$(command -v python || command -v python3) || exit {_NOTHING}
exec "$python" -I -S -B -W ignore -c "$1"
"""


def compiles(sandbox: Sandbox, patch: str, workdir: str) -> bool | None:
    """Whether every `.py` file that `patch` adds or changes compiles, in a sandbox where it has been applied.

    None: nothing was looked at, because the patch leaves no such file, or the image has no Python. Nothing of the
    patch runs and nothing is written. A file that the compiler cannot get through (time, memory, a crash) does not
    compile: the patch made it so.

    Raises `SandboxGone` as `Sandbox.run` does.
    """
    names = _python_files(patch)
    if not names:
        return None
    result = sandbox.run(
        ["bash", "-c", _SCRIPT, "compiles", _PROGRAM],
        input=nul_list(sorted(names)),
        cwd=workdir,
        timeout=TIMEOUT,
    )
    if result.exit_code == _COMPILED and not result.timed_out:
        return True
    killed = result.timed_out or result.oom_killed or result.exit_code > 128
    return False if killed or result.exit_code == _BROKEN else None


def _python_files(patch: str) -> set[str]:
    """Names that the patch may leave. A file whose name lacks git's prefix stands for itself, or for what is left
    of it without its first part, by how it was applied; the one that is not there is passed over."""
    names: set[str] = set()
    for file in files(patch):
        names |= file.touched(1) | (file.touched(0) if file.bare else set())
    return {name for name in names if name.endswith(".py") and safe(name)}
