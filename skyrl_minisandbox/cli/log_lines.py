"""The few lines of a test log that show why a verdict is what it is."""

from __future__ import annotations

import re
from collections.abc import Collection

from skyrl_minisandbox.rewards.parsers import plain

WIDTH = 200

# What test runners and Python write where something went wrong, at the start of a line.
_TELLING = re.compile(
    r"E  +\S|\w*(?:Error|Exception|Warning)\b.*:|(?:ERROR|FAILED|FAIL|Traceback|Segmentation fault|Killed)\b"
    r"|(?:bash|sh|python\S*): .*|usage: |=+ .*(?:failed|error|passed|no tests ran).* =+|Ran \d+ tests?|FAILED \("
)
_IDENTIFIER = re.compile(r"\w+")


def relevant_lines(log: str, names: Collection[str] = (), most: int = 20) -> list[str]:
    """At most `most` lines, cut to `WIDTH` characters, in the log's order.

    names: the tests that the reader wants to know about; lines that name one of them come first, then what
    looks like an error, the last of it first, then the end of the log.
    """
    lines = [line.rstrip()[:WIDTH] for line in plain(log).splitlines()]
    told = [number for number, line in enumerate(lines) if line.strip()]
    words = {_short(name) for name in names} - {""}
    naming = [number for number in told if words & set(_IDENTIFIER.findall(lines[number]))]
    telling = [number for number in reversed(told) if _TELLING.match(lines[number].lstrip())]
    chosen: dict[int, None] = {}
    # Half for those that name a test, or a log of one line a test would leave no room for the reason.
    for numbers, share in ((naming, most // 2), (telling, most), (told[-3:], most) if not telling else ((), 0)):
        for number in list(numbers)[:share]:
            if len(chosen) < most:
                chosen.setdefault(number)
    return [lines[number] for number in sorted(chosen)]


def _short(name: str) -> str:
    """The function or method of a test's name, whatever runner it is of."""
    bare = name.split(" (")[0].rpartition("::")[2].split("[")[0]
    found = _IDENTIFIER.findall(bare)
    return found[-1] if found else ""
