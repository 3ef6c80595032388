"""Which tests may fail as expected: those whose own text says so.

The code under test can raise what a runner takes for an expected failure (`pytest.xfail`, and SymPy's `XFail`), and
datasets count that as passed. So it counts only where the restored test files expect one.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Sequence

_SPEAKS = re.compile(r"xfail|expectedFailure", re.IGNORECASE)
_FUNCTION = re.compile(r"(?:.*::)?(?:.*:)?(\w+)(?:\[.*|\s\(.*)?$", re.DOTALL)


class ExpectedFailures:
    """sources: text of the test files as they run; one that no Python 3 reads tells nothing. They are read when first
    asked about: most runs have no expected failure."""

    def __init__(self, sources: Iterable[str] = ()) -> None:
        self._sources = tuple(sources)
        self._known: set[str] = set()
        self._expecting: set[str] = set()

    @functools.cached_property
    def _functions(self) -> tuple[set[str], set[str]]:
        """Names of the functions of all files, and of those that speak of an expected failure."""
        for text in self._sources:
            try:
                module = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            self._read(module, text.splitlines(), False)
        return self._known, self._expecting

    def _read(self, holder: ast.Module | ast.ClassDef, lines: Sequence[str], expecting: bool) -> None:
        for node in holder.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and _speaks(node, lines):
                expecting = True  # `pytestmark = pytest.mark.xfail`
        for node in holder.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._known.add(node.name)
                if expecting or _speaks(node, lines):
                    self._expecting.add(node.name)
            elif isinstance(node, ast.ClassDef):
                self._read(node, lines, expecting or any(_speaks(mark, lines) for mark in node.decorator_list))

    def allow(self, name: str) -> bool:
        """Whether the listed test `name` may count as passed when it failed as expected. One that is in none of the
        files, or known by its docstring, may."""
        match = _FUNCTION.match(name)
        function = match[1] if match else ""
        known, expecting = self._functions
        return function not in known or function in expecting


def _speaks(node: ast.stmt | ast.expr, lines: Sequence[str]) -> bool:
    """Whether its lines do, those of its decorators too."""
    first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", ()))])
    return any(_SPEAKS.search(line) for line in lines[first - 1 : node.end_lineno])
