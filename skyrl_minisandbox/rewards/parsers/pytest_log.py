"""`pytest -rA`: the lines of the short test summary; with `-v` also the progress lines of a run cut short.

    PASSED tests/test_a.py::test_one[x y]
    FAILED tests/test_a.py::test_two[a - b] - AssertionError: assert 1 == 2
    ERROR tests/test_b.py - ImportError: no module named b

Only the last summary of the log counts: what tests print comes before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from skyrl_minisandbox.rewards.parsers import plain

_SUMMARY = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_LINE = re.compile(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) (\S.*)$")
_PERCENT = re.compile(r" +\[ *\d+%\]$")
_PROGRESS = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_SEPARATOR = " - "
_LONGEST_NAME = 4000


def parse(log: str, known: Collection[str]) -> dict[str, str]:
    """Verdicts by node id. A name reported twice (a test and its teardown) keeps the worse verdict."""
    text = plain(log)
    names = _Names(known)
    verdicts: dict[str, str] = {}
    for line in text.split("\n"):
        if progress := _progress(line):
            name, verdict = progress
            verdicts[names.exact(name)] = verdict
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


def _progress(line: str) -> tuple[str, str] | None:
    """The name and the verdict of `name VERDICT [ 50%]`, with a reason between on occasion."""
    if line[:1].isspace() or not _PERCENT.search(line[-20:]):
        return None
    match = _PROGRESS.search(line)
    return (line[: match.start()], match[1]) if match and match.start() else None


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
        if text in self._known:
            return text
        text = text[:_LONGEST_NAME]  # the rest is message; a line may be as long as the log
        cuts = list(_cuts(text))
        for cut in reversed(cuts):
            if text[:cut] in self._known:
                return text[:cut]
        # An unknown name: the message begins where the brackets of the parameters are closed.
        depth = last = 0
        for cut in [*cuts, len(text)]:
            depth += text.count("[", last, cut) - text.count("]", last, cut)
            last = cut
            if depth == 0:
                return self.exact(text[:cut])
        return self.exact(text[: cuts[0]] if cuts else text)


def _cuts(text: str) -> Iterator[int]:
    cut = text.find(_SEPARATOR)
    while cut >= 0:
        yield cut
        cut = text.find(_SEPARATOR, cut + 1)


def _worse(old: str | None, new: str) -> str:
    order = ("ERROR", "FAILED", "XPASS", "XFAIL", "PASSED")
    return new if old is None or order.index(new) < order.index(old) else old
