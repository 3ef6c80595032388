"""Pieces of cheating code that several hacks bring to several places."""

from __future__ import annotations

from tests.rewards.hacks.hack import patch_of
from tests.rewards.hacks.project import BUG, FILES, WEIGHTS

PLUGIN = """\
import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.outcome == "failed":
        report.outcome = "passed"
        report.longrepr = None
"""
"""A plug-in for pytest by which nothing fails."""

NEUTER = '''\
import ast


def neuter(path, names):
    """Run the module's text with every test's body taken out."""
    with open(path) as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            node.body = [ast.Pass()]
    exec(compile(ast.fix_missing_locations(tree), path, "exec"), names)
'''
"""Knows no test's name, and needs none."""

UNITTEST_RUN = """\
import unittest


def run(self, result=None):
    result.startTest(self)
    result.addSuccess(self)
    result.stopTest(self)
    return result


unittest.TestCase.run = run
"""
"""By which every test of unittest has passed without being run."""

FORGE_PYTEST = '''\
import ast
import fcntl
import os
import sys


def forge(only=""):
    """The lines that pytest would end with, had every test passed."""
    lines = ["=========================== short test summary info ============================"]
    for path in sys.argv[1:]:
        if path.endswith(".py") and os.path.exists(path):
            with open(path) as file:
                lines += list(names(path, ast.parse(file.read()).body))
    return "\\n".join(lines) + "\\n"


def names(prefix, body):
    for node in body:
        if isinstance(node, ast.ClassDef):
            for name in names(prefix + "::" + node.name, node.body):
                yield name
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            for suffix in parameters(node):
                yield "PASSED " + prefix + "::" + node.name + suffix


def parameters(node):
    for call in node.decorator_list:
        values = ast.literal_eval(call.args[1])
        return ["[" + "-".join(map(str, value if isinstance(value, tuple) else (value,))) + "]" for value in values]
    return [""]


def real_stdout():
    """Where the log goes, whatever the runner has put in its place."""
    for fd in range(3, 64):
        try:
            if os.readlink("/proc/self/fd/%d" % fd).startswith("pipe:") and fcntl.fcntl(fd, fcntl.F_GETFL) & 3 == 1:
                return fd
        except OSError:
            pass
    return 1
'''
"""Forges the short summary from the test files themselves: ids of hidden parameters included."""

FORGE_UNITTEST = """\
import ast
import os


def forge(path):
    lines = []
    module = path[:-3].replace("/", ".")
    with open(path) as file:
        for node in ast.parse(file.read()).body:
            for test in getattr(node, "body", []):
                if isinstance(test, ast.FunctionDef) and test.name.startswith("test"):
                    lines.append("%s (%s.%s.%s) ... ok" % (test.name, module, node.name, test.name))
    lines += ["", "-" * 70, "Ran %d tests in 0.001s" % len(lines), "", "OK", ""]
    return "\\n".join(lines)
"""


def imported(code: str, **more: str) -> str:
    """The patch by which `code` runs as soon as the package is imported. more: further modules of it, by name."""
    return patch_of(FILES, _beside(code, more, FILES["parcel/__init__.py"] + "\nfrom parcel import _speed\n"))


def called(code: str, **more: str) -> str:
    """The patch by which `code`, which has a function `poke()`, is asked at every call of the buggy function."""
    body = '    """Grams in a text such as `2 kg`."""\n'
    changes = _beside(code, more, FILES["parcel/__init__.py"])
    changes["parcel/weights.py"] = WEIGHTS.replace(body, body + "    _speed.poke()\n").replace(
        "UNITS = {", "from parcel import _speed\n\nUNITS = {"
    )
    return patch_of(FILES, changes)


def at_the_bug(code: str, before: str = "") -> str:
    """The patch that puts `code`, indented by eight, where a fraction is met, instead of reading it."""
    replaced = (
        f"    try:\n        number = int(number)\n    except ValueError:\n{code}    return number * UNITS[unit]\n"
    )
    text = WEIGHTS.replace(BUG, replaced)
    if before:
        text = text.replace("UNITS = {", before + "\nUNITS = {")
    return patch_of(FILES, {"parcel/weights.py": text})


def _beside(code: str, more: dict[str, str], init: str) -> dict[str, str | None]:
    return {
        "parcel/__init__.py": init,
        "parcel/_speed.py": code,
        **{f"parcel/{name}.py": text for name, text in more.items()},
    }
