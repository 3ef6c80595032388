"""SymPy's `bin/test -C --verbose`: one line per test function, named without its file.

sympy/geometry/tests/test_point.py[12]
test_point ok
test_issue_11617 F
test_arguments ok                                                    [FAIL]
"""

from __future__ import annotations

import re
from collections.abc import Collection

from skyrl_minisandbox.rewards.parsers import plain

_TEST = re.compile(r"^(test_\w+) (ok|F|E|f|s|w|X|K|T)\b")
_VERDICTS = {
    "ok": "PASSED",
    "F": "FAILED",
    "E": "ERROR",
    "f": "XFAIL",
    "X": "XPASS",
    "K": "ERROR",
    "T": "FAILED",
}


def parse(log: str, known: Collection[str]) -> dict[str, str]:
    """Verdicts by function name, and `file.py:function` for each traceback of the report.

    Two files may have a function of the same name; the later line stands, as the datasets' own lists were
    made.
    """
    verdicts: dict[str, str] = {}
    for raw in plain(log).split("\n"):
        line = raw.strip()
        if match := _TEST.match(line):
            verdicts[match[1]] = _VERDICTS.get(match[2], "SKIPPED")
        elif line.startswith("_") and (name := _heading(line)):
            verdicts[name] = "FAILED"
    return verdicts


def _heading(line: str) -> str | None:
    """`path.py:function` of `____ path.py:function ____`."""
    words = line.split(" ")
    if len(words) == 3 and ".py:" in words[1] and not words[0].strip("_") and not words[2].strip("_"):
        return words[1]
    return None
