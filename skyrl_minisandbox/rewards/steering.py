"""Which files steer the test runner: they come from the image, whatever a patch says of them.

A patch is judged by the task's tests, not by its own. So what decides which tests run, how, and what they are told is
put back before they run, unless the gold patch touches that very file: then it is part of the solution.

    test files of the task, and everything below the directories of tests that they lie in
    configuration of runners                 conftest.py, pytest.ini, tox.ini, setup.cfg, pyproject.toml ...
    what Python runs by itself               sitecustomize, usercustomize, *.pth
    plug-ins                                 *.egg-info, *.dist-info (their entry points)
    what stands in front of the real module  bytecode; a module named like one of the runner or of the standard library
                                             in a directory of modules; a package or an extension beside a test file
    the runner itself where the project brings one (Django, SymPy), and every file that the command names

What this does not cover is the code under test: it runs in the runner's process and may do anything there. That is
what canaries are for (`canaries.py`).
"""

from __future__ import annotations

import posixpath
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable

_CONFIGURATION = frozenset({
    "conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "tox.toml", "setup.cfg",
    "pyproject.toml", ".coveragerc", "sitecustomize.py", "usercustomize.py", "noxfile.py",
    ".gitattributes",  # by which git would bring the others back in another form
})  # fmt: skip
_ENDINGS = (".pth", ".pyc", ".pyo")
_PARTS = re.compile(r".*\.(?:egg-info|dist-info)$|sitecustomize$|usercustomize$|__pycache__$")
_RUNNERS = {
    "django": re.compile(r"tests/|django/test/"),
    "sympy": re.compile(r"bin/|sympy/testing/|sympy/utilities/(?:runtests|pytest)\.py$|sympy/conftest\.py$"),
    "command": re.compile(r"(?:GNUm|[Mm])akefile$|noxfile\.py$"),
}
# What runners import before the code under test, beside the standard library.
_MODULES = frozenset({
    "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "exceptiongroup", "tomli", "py", "attr", "colorama",
    "mock", "xdist", "execnet", "hypothesis", "pytest_asyncio", "pytest_cov", "coverage", "nose", "six",
    "pkg_resources", "setuptools", "importlib_metadata", "sitecustomize", "usercustomize",
}) | sys.stdlib_module_names  # fmt: skip
_TEST_DIRECTORY = re.compile(r"_?(?:tests?|testing)")
_MODULE = re.compile(r"(?P<name>[^./]+)(?:\.[^/]*)?\.(?:py|so|pyd|pyc)$|(?P<package>[^./]+)$")


def test_directories(test_files: Iterable[str]) -> frozenset[str]:
    """The topmost directory of tests (`tests`, `pkg/test`, ...) above each test file; files elsewhere have none."""
    found = set()
    for file in test_files:
        parts = file.split("/")[:-1]
        for depth, part in enumerate(parts, 1):
            if _TEST_DIRECTORY.fullmatch(part):
                found.add("/".join(parts[:depth]))
                break
    return frozenset(found)


test_directories.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest makes of the name


class Steering:
    """Judges paths, relative to the workdir, for one task.

    is_package: whether a directory of the workdir (as the image has it, or the patch) is a Python package, so that a
    module in it is imported by a dotted name and stands in front of nothing.
    """

    def __init__(
        self, runner: str, command: str, test_files: Collection[str], gold_files: Collection[str],
        is_package: Callable[[str], bool],
    ) -> None:  # fmt: skip
        self._runner = _RUNNERS.get(runner)
        self._gold = frozenset(gold_files)
        self._tests = frozenset(test_files)
        self._directories = test_directories(test_files)
        self._named = _words(command)
        self._is_package = is_package
        # A directory is its own package's parent; `tests/test_a` stands in front of `tests/test_a.py`.
        self._stems = {file.removesuffix(".py") for file in self._tests if file.endswith(".py")}

    def steers(self, path: str) -> bool:
        """Whether `path` (a file, a link or a directory that is none any more) must be as the image has it."""
        if path in self._gold:
            return False
        parts = path.split("/")
        return (
            parts[-1] in _CONFIGURATION
            or path.endswith(_ENDINGS)
            or any(_PARTS.match(part) for part in parts)
            or path in self._tests
            or path in self._named
            or any(path == top or path.startswith(top + "/") for top in self._directories)
            or bool(self._runner and self._runner.match(path))
            or self._stands_in_front(parts)
        )

    def _stands_in_front(self, parts: list[str]) -> bool:
        for depth in range(1, len(parts) + 1):
            parent, path = "/".join(parts[: depth - 1]), "/".join(parts[:depth])
            match = _MODULE.fullmatch(parts[depth - 1])
            if match is None:
                continue
            name = match["name"] or match["package"]
            if posixpath.join(parent, name) in self._stems:
                return path not in self._tests
            if name in _MODULES and not self._is_package(parent):
                return True
        return False


def _words(command: str) -> frozenset[str]:
    """What of a command could be a file of the workdir."""
    try:
        words = shlex.split(command, comments=False)
    except ValueError:
        words = command.split()
    return frozenset(posixpath.normpath(word) for word in words if word and not word.startswith("-"))
