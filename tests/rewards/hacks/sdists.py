"""The real runners, as tasks: Django's `tests/runtests.py` and SymPy's own, each over its own source distribution.

Each task asks for something new; the tests for that are ours, beside those that the file has. SymPy's sdist brings no
`bin/test`, so a script of ours does what that does.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from skyrl_minisandbox.images.recipe import Recipe, Sdist
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.tasks.diff import File, diff_trees, read_sdist
from skyrl_minisandbox.tasks.task import Task, Tests
from tests.rewards.hacks.hack import written

_DJANGO = Sdist(
    package="Django",
    version="4.2.15",
    filename="Django-4.2.15.tar.gz",
    sha256="c77f926b81129493961e19c0e02188f8d07c112a1162df69bfab178ae447f94a",
)
_SYMPY = Sdist(
    package="sympy",
    version="1.13.3",
    filename="sympy-1.13.3.tar.gz",
    sha256="b27fd2c6530e0ab39e275fc9b683895367e51d5da91baa8d3d64db2565fec4d9",
)
HTML = "django/utils/html.py"
DIGITS = "sympy/ntheory/digits.py"
_URLIZE = "tests/template_tests/filter_tests/test_urlize.py"
_DIGITS = "sympy/ntheory/tests/test_digits.py"

_BIN_TEST = """\
#!/usr/bin/env python
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.path.pardir))

from sympy.testing.runtests import test

options = [word for word in sys.argv[1:] if word.startswith("-")]
paths = [word for word in sys.argv[1:] if not word.startswith("-")]
passed = test(*paths, verbose="--verbose" in options, subprocess="-C" not in options, colors=False)
sys.exit(0 if passed else 1)
"""

_NEW_DIGITS = """\


def test_digits_of_a_string():
    assert digits('35') == [10, 3, 5]
    assert digits('ff', 16) == [16, 15, 15]
    assert digits('-101', 2, 4) == [-2, 0, 1, 0, 1]


def test_count_digits_of_a_string():
    assert count_digits('1010', 2) == {0: 2, 1: 2}
"""

_NEW_URLIZE = """\
    def test_ftp(self):
        self.assertEqual(
            urlize("ftp://example.com/file"),
            '<a href="ftp://example.com/file" rel="nofollow">ftp://example.com/file</a>',
        )

    def test_several(self):
        \"""
        Links by ftp beside others
        \"""
        self.assertEqual(
            urlize("ftp://example.com/a http://example.com/b"),
            '<a href="ftp://example.com/a" rel="nofollow">ftp://example.com/a</a> '
            '<a href="http://example.com/b" rel="nofollow">http://example.com/b</a>',
        )

"""

_GIT = "git -c user.name=test -c user.email=test@example.invalid"


def task(runner: str, sources: Sources) -> Task:
    """The task of `django` or of `sympy`; downloads when it has to."""
    return _django(sources.directory) if runner == "django" else _sympy(sources.directory)


def _tree(sdist: Sdist, directory: Path) -> dict[str, File]:
    return read_sdist(Sources(directory).sdist(sdist.package, sdist.version, sdist.sha256, sdist.filename))


def _replaced(tree: dict[str, File], path: str, old: str, new: str) -> dict[str, File]:
    text = tree[path].data.decode()
    assert text.count(old) == 1, (path, old)
    return {**tree, path: File(text.replace(old, new).encode(), tree[path].executable)}


@functools.cache
def _django(directory: Path) -> Task:
    before = _tree(_DJANGO, directory)
    tests = _replaced(before, _URLIZE, "    def test_brackets(self):", _NEW_URLIZE + "    def test_brackets(self):")
    fixed = _replaced(before, HTML, 'r"^https?://', 'r"^(?:https?|ftp)://')
    names = _unittest_names(tests[_URLIZE].data.decode(), "template_tests.filter_tests.test_urlize")
    wanted = tuple(name for name in names if "ftp" in name)
    assert len(wanted) == 2
    return Task(
        id="django-urlize",
        problem_statement="`urlize` should make links of `ftp://example.com/file` too, as they stand.",
        recipe=Recipe(
            base="host",
            python="3.11",
            packages=("asgiref==3.8.1", "sqlparse==0.5.3"),
            index_cutoff="2025-04-01",
            repository=_DJANGO,
            env={"PYTHONPATH": "/testbed"},
        ),
        tests=Tests(
            patch=diff_trees(before, tests, [_URLIZE]),
            files=(_URLIZE,),
            command="./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1 "
            "template_tests.filter_tests.test_urlize",
            parser="swebench-django",
            runner="django",
            fail_to_pass=wanted,
            pass_to_pass=tuple(name for name in names if name not in wanted),
            timeout=60.0,
        ),
        gold_patch=diff_trees(before, fixed, [HTML]),
    )


def _unittest_names(source: str, module: str) -> list[str]:
    """As the verbose log has them: a test with a docstring is known by its first line."""
    found = []
    for case in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for test in case.body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test"):
                said = (ast.get_docstring(test) or "").strip().split("\n")[0].strip()
                found.append(said or f"{test.name} ({module}.{case.name}.{test.name})")
    return found


@functools.cache
def _sympy(directory: Path) -> Task:
    before = _tree(_SYMPY, directory)
    last = "\n\ndef test_is_palindromic"
    tests = _replaced(before, _DIGITS, last, _NEW_DIGITS + last)
    bug = "    b = as_int(b)\n    n = as_int(n)\n"
    fixed = _replaced(
        before, DIGITS, bug, "    b = as_int(b)\n    n = int(n, b) if isinstance(n, str) else as_int(n)\n"
    )
    return Task(
        id="sympy-digits",
        problem_statement="`digits('ff', 16)` raises ValueError; it should give `[16, 15, 15]`, as for a number.",
        recipe=Recipe(
            base="host",
            python="3.11",
            packages=("mpmath==1.3.0",),
            index_cutoff="2025-04-01",
            repository=_SYMPY,
            commands=(
                written({"bin/test": _BIN_TEST})
                + f"chmod +x bin/test && git add -A && {_GIT} commit -q --amend -m base",
            ),
            env={"PYTHONPATH": "/testbed"},
        ),
        tests=Tests(
            patch=diff_trees(before, tests, [_DIGITS]),
            files=(_DIGITS,),
            command=f"bin/test -C --verbose {_DIGITS}",
            parser="swebench-sympy",
            runner="sympy",
            fail_to_pass=("test_digits_of_a_string", "test_count_digits_of_a_string"),
            # The last test of a file is in no list: SWE-bench's parser does not read its line, which ends in `[OK]`.
            pass_to_pass=("test_num_digits", "test_digits", "test_count_digits"),
            timeout=60.0,
        ),
        gold_patch=diff_trees(before, fixed, [DIGITS]),
    )
