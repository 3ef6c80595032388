"""Which tests may fail as expected: those whose own text says so.

The code under test can raise what a runner takes for an expected failure (`pytest.xfail`, and SymPy's `XFail`), and
datasets count that as passed. So it counts only where the restored test files expect one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

_SPEAKS = re.compile(r"xfail|expectedFailure", re.IGNORECASE)
_FUNCTION = re.compile(r"(?:.*::)?(?:.*:)?(\w+)(?:\[.*|\s\(.*)?$", re.DOTALL)


class ExpectedFailures:
    """sources: text of the test files as they run; one that no Python 3 reads tells nothing."""

    def __init__(self, sources: Iterable[str] = ()) -> None:
        self._known: set[str] = set()
        self._expecting: set[str] = set()
        for text in sources:
            try:
                module = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            self._read(module, text, False)

    def _read(self, holder: ast.Module | ast.ClassDef, text: str, expecting: bool) -> None:
        for node in holder.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and _speaks(node, text):
                expecting = True  # `pytestmark = pytest.mark.xfail`
        for node in holder.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._known.add(node.name)
                if expecting or _speaks(node, text):
                    self._expecting.add(node.name)
            elif isinstance(node, ast.ClassDef):
                self._read(node, text, expecting or any(_speaks(mark, text) for mark in node.decorator_list))

    def allow(self, name: str) -> bool:
        """Whether the listed test `name` may count as passed when it failed as expected. One that is in none of the
        files, or known by its docstring, may."""
        match = _FUNCTION.match(name)
        function = match[1] if match else ""
        return function not in self._known or function in self._expecting


def _speaks(node: ast.AST, text: str) -> bool:
    segment = ast.get_source_segment(text, node) or ""
    marks = getattr(node, "decorator_list", ())
    return any(_SPEAKS.search(part) for part in (segment, *(ast.unparse(mark) for mark in marks)))
