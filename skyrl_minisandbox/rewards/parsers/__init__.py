"""Logs of test runners -> a verdict per test. One module per runner, chosen by `Tests.parser`.

A parser is `parse(log, known) -> {name: verdict}` with verdicts of `VERDICTS`. `known` are the names that
the task asks about: where a log line is ambiguous (names may contain blanks and ` - `), a known name decides.

`pytest`, `unittest`, `django` and `sympy` are ours: careful, and with whole names. The `swebench-` ones give what
SWE-bench's own give, to the letter (`swebench_log`); rows of SWE-bench name the one of their repository, since their
lists were made with it. A test runner's own oddities are kept where they are part of the names (Django's docstrings,
SymPy's bare function names).

A log is the patch's: every parser takes time in proportion to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from skyrl_minisandbox.plugins import load_plugin

Parser = Callable[[str, Collection[str]], dict[str, str]]

VERDICTS = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
PASSING = frozenset({"PASSED", "XFAIL"})
"""What counts as passed, as in SWE-bench 4.1: an expected failure does, an unexpected success does not."""

PARSERS = {
    "pytest": "skyrl_minisandbox.rewards.parsers.pytest_log:parse",
    "django": "skyrl_minisandbox.rewards.parsers.django_log:parse",
    "sympy": "skyrl_minisandbox.rewards.parsers.sympy_log:parse",
    "unittest": "skyrl_minisandbox.rewards.parsers.unittest_log:parse",
    "swebench-django": "skyrl_minisandbox.rewards.parsers.swebench_log:django",
    "swebench-matplotlib": "skyrl_minisandbox.rewards.parsers.swebench_log:matplotlib",
    "swebench-pytest": "skyrl_minisandbox.rewards.parsers.swebench_log:pytest",
    "swebench-pytest-options": "skyrl_minisandbox.rewards.parsers.swebench_log:pytest_options",
    "swebench-pytest-v2": "skyrl_minisandbox.rewards.parsers.swebench_log:pytest_v2",
    "swebench-seaborn": "skyrl_minisandbox.rewards.parsers.swebench_log:seaborn",
    "swebench-sympy": "skyrl_minisandbox.rewards.parsers.swebench_log:sympy",
}

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")


def load_parser(name: str) -> Parser:
    """Return the parser of that name or dotted path. Raises `PluginError`."""
    parser: Any = load_plugin("parser", name, PARSERS, export="a function `parse(log, known) -> {name: verdict}`")
    return parser  # type: ignore[no-any-return]


def plain(log: str) -> str:
    """The log without ANSI escape sequences and carriage returns."""
    return _ESCAPE.sub("", log).replace("\r", "")
