"""Whether the Python files that a patch changes compile, for rewards that pay for it."""

from __future__ import annotations

from skyrl_minisandbox.rewards.apply import GIT, GIT_ENV, as_bytes
from skyrl_minisandbox.sandbox import Sandbox

TIMEOUT = 60.0
"""Seconds for all files together. A tenth of a second is usual; a file that takes a minute was made to."""

_COMPILED, _BROKEN, _NOTHING = 0, 4, 3

# Runs in the environment's own interpreter, from 3.6 on, without its site-packages and with nothing of the patch
# imported. stdin: what `git apply --numstat -z` prints, `ADDED\tDELETED\tPATH\0` a file.
_PROGRAM = f"""
import os, stat, sys
seen = {_NOTHING}
for entry in sys.stdin.buffer.read().split(b"\\0"):
    name = entry.split(b"\\t", 2)[-1]
    if not name.endswith(b".py"):
        continue
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

# $@: git and its options. What git cannot read gives no names, and then nothing was looked at.
_SCRIPT = f"""
set -o pipefail
python=$(command -v python || command -v python3) || exit {_NOTHING}
"$@" apply --numstat -z - 2>/dev/null | "$python" -I -S -B -W ignore -c "$PROGRAM"
"""


def compiles(sandbox: Sandbox, patch: str, workdir: str) -> bool | None:
    """Whether every `.py` file that `patch` adds or changes compiles, in a sandbox where it has been applied.

    None: nothing was looked at, because the patch leaves no such file, or the image has no Python. Nothing of the
    patch runs and nothing is written. A file that the compiler cannot get through (time, memory, a crash) does not
    compile: the patch made it so.

    Raises `SandboxGone` as `Sandbox.run` does.
    """
    result = sandbox.run(
        ["bash", "-c", _SCRIPT, "compiles", *GIT],
        input=as_bytes(patch if patch.endswith("\n") else patch + "\n"),
        cwd=workdir,
        env={**GIT_ENV, "PROGRAM": _PROGRAM},
        timeout=TIMEOUT,
    )
    if result.exit_code == _COMPILED and not result.timed_out:
        return True
    killed = result.timed_out or result.oom_killed or result.exit_code is None or result.exit_code > 128
    return False if killed or result.exit_code == _BROKEN else None
