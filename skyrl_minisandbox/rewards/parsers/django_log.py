"""Django's `runtests.py --verbosity 2`, which is unittest's verbose output on stderr mixed with stdout.

    test_a (forms_tests.tests.test_validators.ValidatorCustomMessageTests) ... ok
    test_b (x.Y)
    The first line of its docstring ... FAIL

Names are the text before ` ... ` on its line, so a test with a docstring is known by the docstring: that is how
SWE-bench's lists name it.
"""

from __future__ import annotations

from collections.abc import Collection

from skyrl_minisandbox.rewards.parsers.unittest_log import read


def parse(log: str, known: Collection[str]) -> dict[str, str]:
    """Verdicts by the name that the log gives a test."""
    return read(log, known, docstrings=True)
