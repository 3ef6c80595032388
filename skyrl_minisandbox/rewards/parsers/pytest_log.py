"""`pytest -rA`: the lines of the short test summary; with `-v` also the progress lines of a run cut short.

    PASSED tests/test_a.py::test_one[x y]
    FAILED tests/test_a.py::test_two[a - b] - AssertionError: assert 1 == 2
    ERROR tests/test_b.py - ImportError: no module named b

Only the last summary of the log counts: what tests print comes before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from skyrl_minisandbox.rewards.parsers import plain

_SUMMARY = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_LINE = re.compile(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) (\S.*)$")
_PROGRESS = re.compile(r"^(\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$")
_SEPARATOR = " - "


def parse(log: str, known: Collection[str]) -> dict[str, str]:
    """Verdicts by node id. A name reported twice (a test and its teardown) keeps the worse verdict."""
    text = plain(log)
    names = _Names(known)
    verdicts: dict[str, str] = {}
    for line in text.splitlines():
        if match := _PROGRESS.match(line):
            verdicts[names.exact(match[1])] = match[2]
    summaries = list(_SUMMARY.finditer(text))
    if not summaries:
        return verdicts
    summary: dict[str, str] = {}
    for line in text[summaries[-1].end() :].split("\n"):
        if match := _LINE.match(line.rstrip()):
            status, rest = match.groups()
            name = names.exact(rest) if status == "PASSED" else names.before_message(rest)
            summary[name] = _worse(summary.get(name), status)
    return verdicts | summary


class _Names:
    """Finds which name a line means: one that the task knows, else the best guess."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = frozenset(known)

    def exact(self, text: str) -> str:
        if text in self._known:
            return text
        # Some datasets cut a name at its first blank ("test_x[log(photon" of "test_x[log(photon flux)]").
        first = text.split(" ", 1)[0]
        return first if first in self._known else text

    def before_message(self, text: str) -> str:
        cuts = [i for i in range(len(text)) if text.startswith(_SEPARATOR, i)]
        for end in [len(text), *reversed(cuts)]:
            if text[:end] in self._known:
                return text[:end]
        # An unknown name: the message begins where the brackets of the parameters are closed.
        closed = (cut for cut in [*cuts, len(text)] if text.count("[", 0, cut) == text.count("]", 0, cut))
        guess = text[: next(closed, cuts[0] if cuts else len(text))]
        return self.exact(guess)


def _worse(old: str | None, new: str) -> str:
    order = ("ERROR", "FAILED", "XPASS", "XFAIL", "PASSED")
    return new if old is None or order.index(new) < order.index(old) else old
