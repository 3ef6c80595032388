"""The channel tells what the log tells: unittest, Django, SymPy, old and new pytest, common plug-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_minisandbox.images.recipe import Recipe, Sdist
from skyrl_minisandbox.rewards import channel
from skyrl_minisandbox.rewards.parsers import load_parser
from skyrl_minisandbox.sandbox import Sandbox
from tests.rewards.channels import EVERY_VERDICT, PYTEST, UNITTEST, VERDICTS, opened, run
from tests.support import needs

ENDINGS = """
import asyncio, unittest, unittest.case
class Base(unittest.TestCase):
    def __call__(self, result=None):  # as Django does for coroutines
        method = getattr(self, self._testMethodName)
        if asyncio.iscoroutinefunction(method):
            setattr(self, self._testMethodName, lambda: asyncio.run(method()))
        super().__call__(result)
class A(Base):
    async def test_coroutine(self): self.assertTrue(True)
    async def test_wrong(self): self.assertTrue(False)
    def test_breaks_off(self): raise unittest.case._ShouldStop
    def test_plain(self): pass
    def test_then_other(self): pass
"""


@needs("userns", "overlay")
def test_a_private_ending_is_no_success_and_a_coroutine_s_stand_in_no_offence(plain: Sandbox) -> None:
    _, told = run(plain, ENDINGS, "python -m unittest -v t.test_x", "unittest")
    verdicts = {name.rpartition(".")[2]: told.tests[name] for name in told.tests if name.startswith("t.test_x.A.")}
    assert verdicts == {
        "test_coroutine": "PASSED", "test_wrong": "FAILED", "test_breaks_off": "FAILED", "test_plain": "PASSED",
        "test_then_other": "PASSED",
    }  # fmt: skip
    assert told.changed == ()


@needs("userns", "overlay")
def test_tests_that_are_others_than_were_collected_are_named(plain: Sandbox) -> None:
    swap = "    def test_b_swaps(self): A.test_then_other.__code__ = A.test_plain.__code__\n"
    _, told = run(plain, ENDINGS + swap, "python -m unittest -v t.test_x", "unittest")
    assert told.changed == ("t.test_x.A.test_then_other",)


UNITTEST_VERDICTS = {
    "pass": "PASSED", "doc": "PASSED", "fail": "FAILED", "error": "ERROR", "skip": "SKIPPED", "xfail": "XFAIL",
    "xpass": "XPASS", "subtests": "FAILED", "nested": "PASSED",
}  # fmt: skip
_INNER = b"import unittest\nclass I(unittest.TestCase):\n    def test_child(self): pass\n"


@needs("userns", "overlay")
def test_every_verdict_of_unittest_arrives_under_all_of_its_names(plain: Sandbox) -> None:
    plain.write_file("t/inner.py", _INNER)
    done, told = run(plain, UNITTEST, "python -c 1; python -m unittest -v t.test_x", "unittest")
    for name, verdict in UNITTEST_VERDICTS.items():
        forms = (f"t.test_x.A.test_{name}", f"test_{name} (t.test_x.A)")
        assert [told.tests.get(form) for form in forms] == [verdict] * 2, name
    assert told.tests["What it is about."] == "PASSED"
    assert told.tests["setUpClass (t.test_x.B)"] == "ERROR"
    assert not [name for name in told.tests if "inner" in name.lower() or "child" in name]
    assert told.asked is not None and set(told.tests) <= told.asked
    assert (told.finished, told.changed) == (True, ())
    log = load_parser("unittest")(done.output, [])
    assert {name: told.tests.get(name) for name in log if ".Inner" not in name} == {
        name: verdict for name, verdict in log.items() if ".Inner" not in name
    }


@needs("userns", "overlay")
def test_only_and_the_limit_of_a_test_hold_for_unittest(plain: Sandbox) -> None:
    hang = UNITTEST + "class C(unittest.TestCase):\n    def test_hang(self):\n        while True: pass\n"
    only = ["test_pass (t.test_x.A)", "What it is about.", "t.test_x.C.test_hang"]
    done, told = run(plain, hang, "python -m unittest -v t.test_x", "unittest", only=only, test_timeout=1.5)
    ran = {name for name in told.tests if name.startswith("t.")}
    assert ran == {"t.test_x.A.test_pass", "t.test_x.A.test_doc"}
    assert told.timed_out == "t.test_x.C.test_hang" and not told.finished
    assert "test_fail" not in done.output


@needs("userns", "overlay")
def test_a_replaced_part_of_unittest_is_named(plain: Sandbox) -> None:
    code = "import unittest\nunittest.TestCase.run = lambda self, result: result.addSuccess(self)\n"
    _, told = run(plain, f"{code}class A(unittest.TestCase):\n    def test_a(self): assert 0\n",
                  "python -m unittest t.test_x", "unittest")  # fmt: skip
    assert told.changed == ("unittest.case:TestCase.run",)


# Slower: other Pythons, other releases of pytest, Django and SymPy, from the package index.

_OLD = ("six==1.16.0", "more-itertools==8.14.0", "wcwidth==0.2.6", "atomicwrites==1.4.0", "setuptools==59.6.0")
_LATER = ("py==1.11.0", "attrs==22.2.0", "packaging==21.3", "pyparsing==3.0.7", "iniconfig==1.1.1", "toml==0.10.2",
          "importlib-metadata==4.8.3", "zipp==3.6.0", "typing-extensions==4.1.1", "tomli==1.2.3")  # fmt: skip
_NOW = ("iniconfig==2.0.0", "packaging==24.2", "exceptiongroup==1.2.2", "tomli==2.0.1", "pygments==2.18.0")


@pytest.mark.ci
@needs("userns", "overlay", "network")
@pytest.mark.parametrize(
    ("python", "packages"),
    [
        ("3.6", ("pytest==3.3.1", "pluggy==0.6.0", "py==1.8.0", "attrs==17.4.0", *_OLD)),
        ("3.6", ("pytest==4.0.2", "pluggy==0.8.1", "py==1.8.0", "attrs==17.4.0", *_OLD)),
        ("3.7", ("pytest==6.2.5", "pluggy==1.0.0", *_OLD, *_LATER)),
        ("3.13", ("pytest==9.0.1", "pluggy==1.6.0", *_NOW)),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_old_and_new_releases_of_pytest_tell_the_same(
    python: str, packages: tuple[str, ...], store_directory: Path, cache_directory: Path
) -> None:
    recipe = Recipe(base="host", python=python, packages=packages, workdir="/srv", commands=("mkdir t",))
    with opened(recipe, store_directory, cache_directory) as sandbox:
        _, told = run(sandbox, EVERY_VERDICT, test_timeout=60.0)
        named = {f"t/test_x.py::{name}": verdict for name, verdict in VERDICTS.items() if "test_names" not in name}
        assert {name: told.tests.get(name) for name in named} == named
        assert (told.finished, told.changed, len(told.asked or ())) == (True, (), len(VERDICTS))
    with opened(recipe, store_directory, cache_directory) as sandbox:
        _, told = run(sandbox, EVERY_VERDICT, only=["t/test_x.py::test_names[c", "t/test_x.py::test_fail"])
        assert set(told.tests) == {"t/test_x.py::test_names[c - d]", "t/test_x.py::test_fail"}


_PLUGINS = (
    "pytest==8.3.4", "pluggy==1.5.0", "iniconfig==2.0.0", "packaging==24.2", "pytest-asyncio==0.24.0",
    "pytest-cov==5.0.0", "coverage==7.6.4", "pytest-xdist==3.6.1", "execnet==2.1.1", "pytest-timeout==2.3.1",
    "pytest-rerunfailures==14.0", "pytest-forked==1.6.0", "py==1.11.0", "pytest-benchmark==4.0.0",
    "py-cpuinfo==9.0.0", "pytest-mock==3.14.0", "hypothesis==6.115.0", "attrs==24.2.0", "sortedcontainers==2.4.0",
    "pytest-subtests==0.13.1",
)  # fmt: skip
_HONEST = """
import asyncio, builtins, unittest, pytest, hypothesis
from hypothesis import strategies
@pytest.mark.asyncio
async def test_async(): await asyncio.sleep(0)
@hypothesis.given(strategies.integers())
def test_property(number): assert number == number
def test_mock(mocker): mocker.patch("builtins.__import__", builtins.__import__); mocker.patch("os.getcwd")
def test_speed(benchmark): benchmark(len, [])
tries = []
@pytest.mark.flaky(reruns=2)
def test_again():
    tries.append(1)
    assert len(tries) > 1
class TestUnit(unittest.TestCase):
    def test_subtests(self):
        with self.subTest(1): pass
        with self.subTest(2): self.skipTest("a part")
"""


@pytest.mark.ci
@needs("userns", "overlay", "network")
@pytest.mark.parametrize("options", ["--cov=t", "-n 2", "--forked"])
def test_common_plugins_change_nothing_of_the_runner(
    options: str, store_directory: Path, cache_directory: Path
) -> None:
    recipe = Recipe(base="host", python="3.11", packages=_PLUGINS, workdir="/srv", commands=("mkdir t",))
    with opened(recipe, store_directory, cache_directory) as sandbox:
        done, told = run(sandbox, _HONEST, f"{PYTEST} {options} t")
    names = ("test_async", "test_property", "test_mock", "test_speed", "test_again", "TestUnit::test_subtests")
    expected = {f"t/test_x.py::{name}": "PASSED" for name in names}
    expected["t/test_x.py::TestUnit::test_subtests"] = "SKIPPED"  # so does this plug-in call it, the log too
    if options == "--forked":  # each try is a process of its own, which knows of no other
        del expected["t/test_x.py::test_again"]
        told.tests.pop("t/test_x.py::test_again", None)
    assert told.tests == expected, done.output
    assert (told.changed, told.finished) == ((), True)
    assert told.asked == frozenset(f"t/test_x.py::{name}" for name in names)


_DJANGO = Sdist(
    package="Django",
    version="4.2.16",
    filename="Django-4.2.16.tar.gz",
    sha256="6f1616c2786c408ce86ab7e10f792b8f15742f7b7b7460243929cb371e7f1dad",
)
_SYMPY = Sdist(
    package="sympy",
    version="1.12",
    filename="sympy-1.12.tar.gz",
    sha256="ebf595c8dac3e0fdc4152c51878b498396ec7f30e7a914d6071e674d49420fb8",
)


@pytest.mark.ci
@needs("userns", "overlay", "network", "git")
def test_django_tells_what_its_log_tells_also_of_the_tests_of_its_test_runner(
    store_directory: Path, cache_directory: Path
) -> None:
    recipe = Recipe(
        base="host",
        python="3.11",
        packages=("asgiref==3.8.1", "sqlparse==0.5.1"),
        repository=_DJANGO,
        env={"PYTHONPATH": "/testbed"},
    )
    command = "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1 test_runner dispatch utils_tests"
    with opened(recipe, store_directory, cache_directory) as sandbox:
        placed = channel.place(sandbox, "django", python="3.11", workdir="/testbed")
        assert placed is not None
        done = sandbox.run(command, cwd="/testbed", timeout=600)
        told = placed.read(sandbox)
    log = load_parser("django")(done.output, [])
    assert len(log) > 500
    assert {name: told.tests.get(name) for name in log} == log
    assert told.asked is not None and set(told.tests) <= told.asked
    assert (told.finished, told.changed) == (True, ())


@pytest.mark.ci
@needs("userns", "overlay", "network", "git")
def test_sympy_tells_what_its_log_tells_from_the_process_that_it_starts(
    store_directory: Path, cache_directory: Path
) -> None:
    script = (
        "import sys\nfrom sympy.testing.runtests import test\n"
        "sys.exit(not test(*sys.argv[1:], verbose=True, colors=False, timeout=60))\n"
    )
    bad = (
        "from sympy.testing.pytest import XFAIL, skip\ndef test_ok(): pass\ndef test_fail(): assert 0\n"
        "def test_error(): 1 / 0\ndef test_skip(): skip('why')\n@XFAIL\ndef test_xfail(): assert 0\n"
        "@XFAIL\ndef test_xpass(): pass\n"
    )
    recipe = Recipe(
        base="host", python="3.9", packages=("mpmath==1.3.0",), repository=_SYMPY, env={"PYTHONPATH": "/testbed"}
    )
    with opened(recipe, store_directory, cache_directory) as sandbox:
        sandbox.write_file("/testbed/run_tests.py", script.encode())
        sandbox.write_file("/testbed/sympy/core/tests/test_every.py", bad.encode())
        placed = channel.place(sandbox, "sympy", python="3.9", workdir="/testbed")
        assert placed is not None
        files = "sympy/core/tests/test_every.py sympy/geometry/tests/test_point.py"
        done = sandbox.run(f"python run_tests.py {files}", cwd="/testbed", timeout=300)
        told = placed.read(sandbox)
    every = {"ok": "PASSED", "fail": "FAILED", "error": "ERROR", "skip": "SKIPPED", "xfail": "XFAIL", "xpass": "XPASS"}
    for name, verdict in every.items():
        forms = (f"test_{name}", f"sympy/core/tests/test_every.py:test_{name}")
        assert [told.tests.get(form) for form in forms] == [verdict] * 2
    log = load_parser("sympy")(done.output, [])
    assert len(log) > 10
    lines_of_tests = {name: verdict for name, verdict in log.items() if ":" not in name}  # not a traceback's heading
    assert {name: told.tests.get(name) for name in lines_of_tests} == lines_of_tests
    assert (told.asked, told.finished) == (None, True)
