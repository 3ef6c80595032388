"""Sandboxes whose tests report over the channel, and a file of tests with every verdict of pytest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.rewards import channel
from skyrl_minisandbox.rewards.channel import Results
from skyrl_minisandbox.sandbox import CommandResult, Limits, Sandbox
from tests.support import find_python

PYTEST = "python -m pytest -rA -p no:cacheprovider"

# /opt/env without an index: a venv of the host's own Python, into which the tests copy their own pytest.
RECIPE = Recipe(base="host", workdir="/srv", commands=("mkdir t && /usr/bin/python3 -m venv --without-pip /opt/env",))


@contextmanager
def opened(recipe: Recipe, store: Path, cache: Path, **limits: int) -> Iterator[Sandbox]:
    prefix = find_python(recipe.python) if recipe.python else None
    if recipe.python and prefix is None:
        pytest.skip(f"no Python {recipe.python}")
    image = build_image(
        recipe, store=Store(store), cache=Cache(cache), pythons=[str(prefix)] if prefix else (), progress=None
    )
    room = Limits(**{"memory": 1 << 30, "disk": 256 << 20, "processes": 256, **limits})
    with Cache(cache).checkout(image, Store(store)) as checkout, Sandbox(checkout.sandbox_spec(limits=room)) as sandbox:
        yield sandbox


def run(
    sandbox: Sandbox, source: str, command: str = f"{PYTEST} t", runner: str = "pytest", **more: object
) -> tuple[CommandResult, Results]:
    """What the log and what the channel tells of `t/test_x.py`."""
    sandbox.write_file("t/test_x.py", source.encode())
    placed = channel.place(sandbox, runner, python=None, workdir="/srv", **more)  # type: ignore[arg-type]
    assert placed is not None
    done = sandbox.run(f"PATH=/opt/env/bin:$PATH; {command}", cwd="/srv", timeout=120)
    return done, placed.read(sandbox)


EVERY_VERDICT = """
import unittest, pytest
def test_pass(): pass
def test_fail(): assert 0
@pytest.mark.skip
def test_skip(): pass
@pytest.mark.xfail
def test_xfail(): assert 0
@pytest.mark.xfail
def test_xpass(): pass
@pytest.mark.xfail(strict=True)
def test_strict(): pass
@pytest.fixture
def broken(): 1 / 0
def test_setup(broken): pass
@pytest.fixture
def breaks():
    yield
    1 / 0
def test_teardown(breaks): pass
@pytest.fixture
def skips_after():
    yield
    pytest.skip("later")
def test_skip_after(skips_after): pass
@pytest.mark.parametrize("text", ["a b", "c - d", "[/e]", "\\u00e9"])
def test_names(text): pass
class TestUnit(unittest.TestCase):
    def test_subtests(self):
        for number in range(3):
            with self.subTest(number): assert number == 1
    def test_pass(self): pass
"""
VERDICTS = {
    "test_skip_after": "PASSED",
    "test_pass": "PASSED", "test_fail": "FAILED", "test_skip": "SKIPPED", "test_xfail": "XFAIL", "test_xpass": "XPASS",
    "test_strict": "FAILED", "test_setup": "ERROR", "test_teardown": "ERROR", "test_names[a b]": "PASSED",
    "test_names[c - d]": "PASSED", "test_names[[/e]]": "PASSED", "test_names[\\xe9]": "PASSED",
    "TestUnit::test_subtests": "FAILED", "TestUnit::test_pass": "PASSED",
}  # fmt: skip

UNITTEST = """
import subprocess, sys, unittest
class A(unittest.TestCase):
    def test_pass(self): pass
    def test_doc(self):
        \"\"\"What it is about.

        More.\"\"\"
    def test_fail(self): assert 0
    def test_error(self): 1 / 0
    @unittest.skip("why")
    def test_skip(self): pass
    @unittest.expectedFailure
    def test_xfail(self): assert 0
    @unittest.expectedFailure
    def test_xpass(self): pass
    def test_subtests(self):
        for number in range(3):
            with self.subTest(number=number): self.assertEqual(number, 1)
    def test_nested(self):
        class Inner(unittest.TestCase):
            def test_inner(self): assert 0
        unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Inner))
        Inner("test_inner").run(unittest.TestResult())
        subprocess.run([sys.executable, "-m", "unittest", "t.inner"], check=True)
class B(unittest.TestCase):
    @classmethod
    def setUpClass(cls): 1 / 0
    def test_pass(self): pass
"""
