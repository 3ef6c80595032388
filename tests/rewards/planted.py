"""Test files with canaries: lists of tests, and a corpus of what is installed here."""

from __future__ import annotations

import ast
import functools
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.rewards.canaries import Planted, plant
from skyrl_minisandbox.tasks.task import Tests


def listed(*names: str, hidden: int = 1, command: str = "pytest -rA") -> Tests:
    """Tests of which the first `hidden` are fail-to-pass."""
    return Tests(patch="", files=(), command=command, fail_to_pass=names[:hidden], pass_to_pass=names[hidden:])


def names_in(text: str, path: str = "test_it.py") -> list[str]:
    """Node ids of the plain-looking tests of a source."""
    found = []
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{path}::{node.name}::" if isinstance(node, ast.ClassDef) else f"{path}::"
        found += [prefix + f.name for f in inner if isinstance(f, ast.FunctionDef) and f.name.startswith("test")]
    return found


@functools.cache
def corpus() -> tuple[Path, ...]:
    """Test files of the installed packages and of the standard library, in an order of chance that stays."""
    roots = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib")) / "test"]
    roots += [Path(path) / "test" for path in Path(sys.base_prefix).parent.glob("3.*/lib/python3.*")]
    found = sorted({path for root in roots for path in root.rglob("test_*.py") if 500 < path.stat().st_size < 60_000})
    random.Random(5).shuffle(found)
    return tuple(found)


def planted_corpus(count: int) -> Iterator[tuple[Path, str, Planted]]:
    """Planted files of the corpus, where every test that looks plain counts as listed."""
    done = 0
    for path in corpus():
        try:
            text = path.read_bytes().decode()
            names = names_in(text)
        except (SyntaxError, ValueError):
            continue
        random.Random(str(path)).shuffle(names)
        planted = plant("pytest", {"test_it.py": text}, listed(*names), random.Random(path.name))
        if planted.canaries:
            yield path, text, planted
            done += 1
        if done == count:
            return
    if done < min(count, 20):
        pytest.skip(f"only {done} test files are installed here")


def without(module: ast.Module, names: set[str]) -> ast.Module:
    bodies: list[ast.Module | ast.ClassDef] = [module]
    bodies += [node for node in module.body if isinstance(node, ast.ClassDef)]
    for body in bodies:
        body.body = [n for n in body.body if not (isinstance(n, ast.FunctionDef) and n.name in names)]
    return module


def bare(planted: Planted, must: str = "") -> set[str]:
    """The function names of the canaries."""
    return {re.split(r"[ \[]", c.names[0].rsplit("::", 1)[-1])[0] for c in planted.canaries if must in ("", c.must)}
