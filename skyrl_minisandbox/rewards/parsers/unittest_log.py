"""`python -m unittest -v`, and what is made of it: lines of progress, then a block for each failure.

    test_a (tests.test_x.Case.test_a) ... ok
    test_b (tests.test_x.Case.test_b)
    The first line of its docstring ... FAIL

A test is known by its first line, `test_b (tests.test_x.Case.test_b)`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from skyrl_minisandbox.rewards.parsers import plain

_MARK = " ... "
_WORDS = {
    "ok": "PASSED",
    "OK": "PASSED",
    "FAIL": "FAILED",
    "ERROR": "ERROR",
    "expected failure": "XFAIL",
    "unexpected success": "XPASS",
}
_BAD = ("FAILED", "ERROR")
_TEST = re.compile(r"\w+ \([\w.<>]+\)")
_RULE = re.compile(r"={70}|-{70}")
_TAIL = re.compile(r"(?:^|[\s.)\]])(ok|FAIL|ERROR)$")
_MOST_MARKS = 20
_LONGEST_NAME = 1000


def parse(log: str, known: Collection[str]) -> dict[str, str]:
    """Verdicts by `str(test)`."""
    return read(log, known, docstrings=False)


def read(log: str, known: Collection[str], *, docstrings: bool) -> dict[str, str]:
    """Verdicts of the tests of a log. docstrings: a test that has one is known by it, not by its first line.

    A test may print between its name and its verdict. Then the verdict stands on a line of its own, or at the
    end of what was printed, and belongs to the last test that was begun. A `FAIL:` or `ERROR:` block of the
    report at the end overrules what the progress line said, since a subtest fails only there.
    """
    reader = _Reader(known, docstrings)
    lines = [line.strip() for line in plain(log).split("\n")]
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if line.startswith(("FAIL: ", "ERROR: ")) and _RULE.fullmatch(before):
            word, _, text = line.partition(": ")
            reader.failed(_WORDS[word], text, after)
        else:
            reader.progress(before, line)
    return reader.verdicts


class _Reader:
    def __init__(self, known: Collection[str], docstrings: bool) -> None:
        self.verdicts: dict[str, str] = {}
        self._known = frozenset(known)
        self._docstrings = docstrings
        self._names: dict[str, str] = {}  # first line of a test -> the name that it goes by
        self._begun: str | None = None

    def progress(self, before: str, line: str) -> None:
        """One line that is no heading of a block."""
        begun = self._begins(before, line)
        if begun is not None:
            self._begun, rest = begun
            verdict = _verdict(rest)
            if verdict is None:
                verdict = _verdict(rest.rpartition(_MARK)[2])
        elif self._begun is not None:
            verdict = _verdict(line)
            if verdict is None and (tail := _TAIL.search(line[-100:])):
                verdict = _WORDS[tail[1]]
        else:
            return
        if verdict is not None:
            if self.verdicts.get(self._begun) not in _BAD or verdict in _BAD:
                self.verdicts[self._begun] = verdict
            self._begun = None

    def _begins(self, before: str, line: str) -> tuple[str, str] | None:
        """The test that begins on this line, and what follows its mark."""
        splits = _splits(line)
        if not splits:
            return None
        first, rest = splits[0]
        header = _header(first)
        if header is not None:
            return self._names.setdefault(header, first if first in self._known else header), rest
        # A docstring, below the test's first line. It may contain the mark itself: a known name decides.
        header = _header(before)
        chosen = next((split for split in reversed(splits) if split[0] in self._known), None)
        if chosen is None and header is not None:
            chosen = next((split for split in splits if _verdict(split[1]) is not None), splits[0])
        if chosen is None:
            return None
        name, rest = chosen
        if header is not None:
            name = self._names.setdefault(header, name if self._docstrings else header)
        return name, rest

    def failed(self, verdict: str, text: str, after: str) -> None:
        """A block of the report. `test_a (x.Y) (value=3)` and `test_a (x.Y) [message]` are subtests."""
        header = _header(text) or text
        known = self._docstrings and after in self._known
        self.verdicts[after if known else self._names.get(header, header)] = verdict


def _splits(line: str) -> list[tuple[str, str]]:
    """What stands before and after each mark; of a line with many, those of the first."""
    line = line + " " if line.endswith(" ...") else line
    splits: list[tuple[str, str]] = []
    cut = line.find(_MARK)
    while cut >= 0 and len(splits) < _MOST_MARKS:
        splits.append((line[:cut], line[cut + len(_MARK) :].strip()))
        cut = line.find(_MARK, cut + 1)
    return splits


def _header(text: str) -> str | None:
    """The first line of a test, `test_a (x.Y)`: the whole text, what a subtest adds to, or a printed line's end."""
    match = _TEST.match(text[:_LONGEST_NAME])
    if match and (match.end() == len(text) or text.startswith((" (", " ["), match.end())):
        return match[0]
    opening = text.rfind(" (")
    if opening < 0 or not text.endswith(")"):
        return None
    reversed_name = re.match(r"\w*", text[max(opening - _LONGEST_NAME, 0) : opening][::-1])
    header = f"{reversed_name[0][::-1] if reversed_name else ''}{text[opening:]}"
    return header if len(header) <= _LONGEST_NAME and _TEST.fullmatch(header) else None


def _verdict(text: str) -> str | None:
    if text.startswith("skipped"):
        return "SKIPPED"
    if text in _WORDS:
        return _WORDS[text]
    return "PASSED" if text.startswith("ok") and not text[2:3].isalnum() else None
