"""What `self_check` tries from inside a sandbox: real attempts, each with one verdict.

This module and its two neighbours run inside, in whatever Python the machine has there, so they import the standard
library only and nothing else of ours. `main` prints a JSON line `[name, verdict, detail]` an attempt, as it ends.
What it is given is what the machine planted (`traps.py`): attempts that look for that are tried on the bare machine
first, where they must get through, or they could not fail inside either.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Optional, Union

OK, WEAK, BAD, NOT_RUN = "OK", "WEAK", "BAD", "not run"
REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)

Outcome = Optional[Union[str, tuple[str, str]]]  # noqa: UP007, UP045  the Python inside may be older than ours
"""What got through (BAD), `(verdict, detail)`, or None: all is as it should be."""


class Lacking(Exception):
    """The attempt cannot be judged here, and why."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One invariant.

    promise: it, as a sentence. run: tries to break it. trap: it looks for what the machine planted.
    works: an error of the system is BAD; it means refused, and so OK, elsewhere.
    """

    name: str
    promise: str
    run: Callable[[dict[str, Any]], Outcome]
    trap: bool
    works: bool


ATTEMPTS: dict[str, Attempt] = {}


def attempt(
    name: str, promise: str, *, trap: bool = False, works: bool = False
) -> Callable[[Callable[[dict[str, Any]], Outcome]], Callable[[dict[str, Any]], Outcome]]:
    """Register a function as an attempt; they are tried in order."""

    def register(run: Callable[[dict[str, Any]], Outcome]) -> Callable[[dict[str, Any]], Outcome]:
        ATTEMPTS[name] = Attempt(name, promise, run, trap, works)
        return run

    return register


def judged(one: Attempt, known: dict[str, Any]) -> tuple[str, str]:
    """Try it: (verdict, detail)."""
    try:
        outcome = one.run(known)
    except Lacking as reason:
        return NOT_RUN, str(reason)
    except OSError as error:
        return (BAD, f"it fails: {error}") if one.works else (OK, "")
    except Exception as error:
        return NOT_RUN, f"the attempt itself failed: {error!r}"
    if outcome is None:
        return OK, ""
    return outcome if isinstance(outcome, tuple) else (BAD, outcome)


# For the attempts

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long
libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)


def call(number: int, *arguments: Any) -> int:
    result: int = libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read(path: str, size: int = 1 << 16) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, size).decode(errors="replace")
    finally:
        os.close(fd)


def opens(paths: list[str], flags: int) -> list[str]:
    found = []
    for path in paths:
        try:
            os.close(os.open(path, flags | os.O_NONBLOCK))
            found.append(path)
        except OSError:
            continue
    return found


def status() -> dict[str, str]:
    try:
        lines = read("/proc/self/status").splitlines()
    except OSError as error:
        raise Lacking("/proc is empty inside") from error
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def main() -> None:
    """Try everything, or what `known["only"]` names. `known` is the file that argv names."""
    from skyrl_minisandbox.sandbox.check import reach, refused  # noqa: F401  they register themselves

    with open(sys.argv[1]) as file:
        known = json.load(file)
    for name, one in ATTEMPTS.items():
        if not known.get("only") or name in known["only"]:
            print(json.dumps([name, *judged(one, known)]), flush=True)
