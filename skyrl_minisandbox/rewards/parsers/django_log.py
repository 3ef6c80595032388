"""Django's `runtests.py --verbosity 2`, which is unittest's verbose output on stderr mixed with stdout.

    test_a (forms_tests.tests.test_validators.ValidatorCustomMessageTests) ... ok
    test_b (x.Y)
    The first line of its docstring ... FAIL

Names are the text before ` ... ` on its line, so a test with a docstring is known by the docstring.
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
_DETAIL = re.compile(r"^(FAIL|ERROR): (\S.*)$")


def parse(log: str, known: Collection[str]) -> dict[str, str]:
    """Verdicts by the name that the log gives a test.

    A test may print between its name and its verdict. Then the verdict stands on a line of its own, or at the
    end of what was printed, and belongs to the last test that was begun. A `FAIL:` or `ERROR:` block of the
    report at the end overrules what the progress line said, since a subtest fails only there.
    """
    names = frozenset(known)
    verdicts: dict[str, str] = {}
    begun: str | None = None
    for raw in plain(log).split("\n"):
        line = raw.strip()
        if match := _DETAIL.match(line):
            _detail(match[1], match[2], names, verdicts)
            continue
        if _MARK in line or line.endswith(" ..."):
            name, _, rest = (line + " ").partition(_MARK)
            whole = line.rpartition(_MARK)[0]
            # A docstring may contain the mark itself; the known name decides.
            if whole in names:
                name, rest = whole, line[len(whole) + len(_MARK) :]
            begun = name
            verdict = _verdict(rest.strip())
            if verdict is None and (tail := line.rpartition(_MARK)[2].strip()) != rest.strip():
                verdict = _verdict(tail)
            if verdict is not None:
                verdicts[name] = verdict
                begun = None
        elif begun is not None:
            verdict = _verdict(line)
            if verdict is None:
                word = re.search(r"(?:^|[\s.)\]])(ok|FAIL|ERROR)$", line)
                verdict = _WORDS[word[1]] if word else None
            if verdict is not None:
                verdicts[begun] = verdict
                begun = None
    return verdicts


def _verdict(text: str) -> str | None:
    if text.startswith("skipped"):
        return "SKIPPED"
    if text in _WORDS:
        return _WORDS[text]
    return "PASSED" if text.startswith("ok") and not text[2:3].isalnum() else None


def _detail(word: str, text: str, names: frozenset[str], verdicts: dict[str, str]) -> None:
    verdict = _WORDS[word]
    # "test_a (x.Y) (value=3)" and "test_a (x.Y) [message]" are subtests of "test_a (x.Y)".
    match = re.match(r"(\S+ \([^()]*\))", text)
    name = match[1] if match else text
    if name in names or name in verdicts:
        verdicts[name] = verdict
    else:
        verdicts[text.split()[0]] = verdict
