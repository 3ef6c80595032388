"""The log parsers of SWE-bench, verdict for verdict: its datasets list the names that these give.

Each is `parse(log, known=(), rules="4.1") -> {name: verdict}`; `known` decides nothing here. Rules: `4.1` as in
its release 4.1.0, `5.0` as in 5.0.2. What they make of an odd log is theirs, and kept: a parameter is cut at its
first blank, a summary line's first word stands as the verdict even when it is none of `VERDICTS`, Django's `ok` on
a line of its own passes the test that was begun last.

Differences of the two, all in how a name is cut:

- 5.0 leaves out `SKIPPED [3] file.py:9: why`, which 4.1 takes for a test named `[3]`;
- 5.0's `pytest_v2` keeps the blanks of parameters;
- 4.1's `seaborn` stops with an error at a verdict without a name, so that nothing is graded: here there are no
  results then. So does `django` of both at a lone `FAIL:` or `ERROR:`.

Where the original searches with regular expressions whose time grows with the square of a line, the same is found
in one pass: the log is the patch's, and may hold a line of megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

_STATUS = ("FAILED", "PASSED", "SKIPPED", "ERROR", "XFAIL")
_SKIP_COUNT = re.compile(r"^\[\d+\]$")
_COLOUR = re.compile(r"\[(\d+)m")
_CONTROLS = str.maketrans("", "", "".join(map(chr, range(1, 32))))


_End = Callable[[re.Match[str]], int | None]
"""Where the message that begins with this match ends; None when it does not end as it must."""


class Stopped(Exception):
    """Where the original stops with an error of its own, so that its harness grades nothing."""


class SwebenchParser(Protocol):
    """One of the parsers of this module."""

    def __call__(self, log: str, known: Collection[str] = ..., rules: str = ...) -> dict[str, str]: ...


def pytest(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """flask, pytest, xarray: the first word after the verdict is the name."""
    return _summary(log.split("\n"), rules)


def pytest_options(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """pylint, requests: of a parameter that is an absolute path only the last part is kept."""
    return _summary(log.split("\n"), rules, _short_path)


def matplotlib(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """The numbers that newer Pythons print as members of an enum."""
    log = log.replace("MouseButton.LEFT", "1").replace("MouseButton.RIGHT", "3")
    return _summary(log.split("\n"), rules)


def _summary(lines: list[str], rules: str, rename: Callable[[str], str] = str) -> dict[str, str]:
    verdicts: dict[str, str] = {}
    for line in lines:
        if not line.startswith(_STATUS):
            continue
        if line.startswith("FAILED"):
            line = line.replace(" - ", " ")
        words = line.split()
        if len(words) > 1 and not _skip_count(words, rules):
            verdicts[rename(words[1])] = words[0]
    return verdicts


def _skip_count(words: list[str], rules: str) -> bool:
    return rules != "4.1" and words[0] == "SKIPPED" and _SKIP_COUNT.match(words[1]) is not None


def _short_path(word: str) -> str:
    opening = word.find("[")
    closing = word.rfind("]", opening + 1)
    if opening < 0 or closing < 0:
        return word
    option = word[opening + 1 : closing]
    if option.startswith("/") and not option.startswith("//") and "*" not in option:
        option = "/" + option.rpartition("/")[2]
    return f"{word[:opening]}[{option}]"  # what follows the bracket is dropped


def pytest_v2(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """astropy, scikit-learn, sphinx: colours are removed, and progress lines (`name PASSED`) count as well."""
    verdicts: dict[str, str] = {}
    for raw in log.split("\n"):
        line = _COLOUR.sub("", raw).translate(_CONTROLS)
        if line.startswith(_STATUS):
            if line.startswith("FAILED"):
                line = line.replace(" - ", " ") if rules == "4.1" else line.partition(" - ")[0]
            words = line.split()
            if len(words) > 1 and not _skip_count(words, rules):
                verdicts[words[1] if rules == "4.1" else " ".join(words[1:])] = words[0]
        elif line.endswith(_STATUS):
            words = line.split()
            if len(words) > 1 and rules == "4.1":
                verdicts[words[0]] = words[1]
            elif len(words) > 1:
                verdicts[" ".join(words[:-1])] = words[-1]
    return verdicts


def seaborn(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """Passed and failed tests only, of the summary and of progress lines."""
    try:
        return _seaborn(log, known, rules)
    except Stopped:
        return {}


def _seaborn(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    verdicts: dict[str, str] = {}
    for line in log.split("\n"):
        named = line.startswith(("FAILED", "PASSED"))
        if not named and " PASSED " not in line:
            continue
        words = line.split()
        if len(words) < 2:
            if rules == "4.1":
                raise Stopped(f"a line has a verdict and no name: {line[:80]!r}")
            continue
        if line.startswith("FAILED"):
            verdicts[words[1]] = "FAILED"
        elif " PASSED " in line:
            if words[1] == "PASSED":
                verdicts[words[0]] = "PASSED"
        else:
            verdicts[words[1]] = "PASSED"
    return verdicts


def sympy(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """Bare function names of the progress lines, and `file.py:function` of each traceback's heading."""
    lines = log.split("\n")
    verdicts = dict.fromkeys(filter(None, map(_heading, lines)), "FAILED")
    for line in map(str.strip, lines):
        if line.startswith("test_"):
            for mark, verdict in ((" E", "ERROR"), (" F", "FAILED"), (" ok", "PASSED")):
                if line.endswith(mark):
                    verdicts[line.split()[0]] = verdict
    return verdicts


def _heading(line: str) -> str | None:
    """`path.py:function` of `____ path.py:function ____`: between the first and the last blank, cut at `.py:`."""
    first, last = line.find(" "), line.rfind(" ")
    cut = line.rfind(".py:", first + 1, last) if first >= 0 else -1
    return f"{line[first + 1 : cut]}.py:{line[cut + 4 : last]}" if cut >= 0 else None


_DJANGO_ODD = "--version is equivalent to version"
_DJANGO_GLUED = "Applying sites.0002_alter_domain_unique...test_no_migrations"
_DJANGO_PASS = (" ... ok", " ... OK", " ...  OK")
_DJANGO_TESTING = re.compile(r"\s\.\.\.\sTesting against Django installed in ")
_DJANGO_SILENCED = re.compile(r" silenced\)\.\nok$", re.MULTILINE)
_DJANGO_SERVER = re.compile(r"\s\.\.\.\sInternal Server Error: /")
_DJANGO_CHECK = re.compile(r"\s\.\.\.\sSystem check identified no issues \(0 silenced\)\nok$", re.MULTILINE)


def django(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    """`runtests.py --verbosity 2`: the text before ` ... ` is the name, a docstring's first line where there is one."""
    try:
        return _django(log, known, rules)
    except Stopped:
        return {}


def _django(log: str, known: Collection[str] = (), rules: str = "4.1") -> dict[str, str]:
    verdicts: dict[str, str] = {}
    begun: str | None = None
    for line in map(str.strip, log.split("\n")):
        if _DJANGO_ODD in line:
            verdicts[_DJANGO_ODD] = "PASSED"
        if " ... " in line:
            begun = line.partition(" ... ")[0]
        for mark in _DJANGO_PASS:
            if line.endswith(mark):
                if line.startswith(_DJANGO_GLUED):
                    line = line.partition("...")[2].strip()
                verdicts[line.rpartition(mark)[0]] = "PASSED"
                break
        if " ... skipped" in line:
            verdicts[line.partition(" ... skipped")[0]] = "SKIPPED"
        for word, verdict in (("FAIL", "FAILED"), ("ERROR", "ERROR")):
            if line.endswith(f" ... {word}"):
                verdicts[line.partition(f" ... {word}")[0]] = verdict
            if line.startswith(f"{word}:"):
                words = line.split()
                if len(words) < 2:
                    raise Stopped(f"a line has a verdict and no name: {line[:80]!r}")
                verdicts[words[1]] = verdict
        if line.startswith("ok") and begun is not None:
            verdicts[begun] = "PASSED"
    for name in _django_interrupted(log):
        verdicts[name] = "PASSED"
    return verdicts


def _django_interrupted(log: str) -> Iterator[str]:
    """Tests whose verdict stands below one of three messages that are known to come between."""
    messages: tuple[tuple[re.Pattern[str], _End], ...] = (
        (_DJANGO_TESTING, _silenced(log)),
        (_DJANGO_SERVER, _server_error(log)),
        (_DJANGO_CHECK, re.Match.end),
    )
    for pattern, end in messages:
        position = done = line = 0
        while match := pattern.search(log, position):
            newline = log.rfind("\n", max(position - 1, 0), match.start())
            line = newline + 1 if newline >= 0 else line
            position = match.start() + 1
            stop = end(match) if line >= done else None  # a match begins after the last one, at a line's start
            if stop is not None:
                yield log[line : match.start()]
                position = done = stop


def _silenced(log: str) -> _End:
    start, stop = -1, 0

    def end(match: re.Match[str]) -> int | None:
        nonlocal start, stop
        if start < match.end():
            found = _DJANGO_SILENCED.search(log, match.end())
            start, stop = found.span() if found else (len(log) + 1, 0)
        return stop or None

    return end


def _server_error(log: str) -> _End:
    newline = -1

    def end(match: re.Match[str]) -> int | None:
        nonlocal newline
        if newline < match.end():
            found = log.find("\n", match.end())
            newline = found if found >= 0 else len(log)
        if newline <= match.end() or log[newline - 1] != "/" or not log.startswith("ok", newline + 1):
            return None
        stop = newline + 3
        return stop if log[stop : stop + 1] in ("", "\n") else None

    return end


PARSERS: dict[str, SwebenchParser] = {
    "swebench-django": django,
    "swebench-matplotlib": matplotlib,
    "swebench-pytest": pytest,
    "swebench-pytest-options": pytest_options,
    "swebench-pytest-v2": pytest_v2,
    "swebench-seaborn": seaborn,
    "swebench-sympy": sympy,
}

STOPPING: dict[str, SwebenchParser] = {**PARSERS, "swebench-django": _django, "swebench-seaborn": _seaborn}
"""The same, which raise `Stopped`."""
