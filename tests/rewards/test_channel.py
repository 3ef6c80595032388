"""Results come over a file that the tests' output cannot write, from real runners in real sandboxes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.images.recipe import Recipe, Sdist
from skyrl_minisandbox.rewards import channel
from skyrl_minisandbox.rewards.channel import Results
from skyrl_minisandbox.rewards.parsers import load_parser
from skyrl_minisandbox.sandbox import CommandResult, Limits, Sandbox
from tests.support import find_python, needs

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


@pytest.fixture
def plain(store_directory: Path, cache_directory: Path) -> Iterator[Sandbox]:
    """A sandbox with a Python at /opt/env that has nothing but its standard library."""
    with opened(RECIPE, store_directory, cache_directory) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(plain: Sandbox, tmp_path: Path) -> Sandbox:
    """The same with this pytest."""
    version = plain.run(["/opt/env/bin/python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).output
    if tuple(map(int, version.split("."))) < (3, 11):
        pytest.skip("the host's Python needs more than this pytest's own files")
    ours = Path(pytest.__file__).parents[1]  # wherever the pytest that runs this was installed
    names = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")
    found = [path for name in names for path in (ours / name, *ours.glob(f"{name}-*.dist-info")) if path.exists()]
    for path in found:
        shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ours / "py.py", tmp_path)  # pytest's own stand-in
    plain.put_tree(tmp_path, f"/opt/env/lib/python{version.strip()}/site-packages")
    return plain


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


@needs("userns", "overlay")
def test_every_verdict_of_pytest_arrives_and_nothing_of_ours_is_seen(sandbox: Sandbox) -> None:
    before = sandbox.run("ls -A /opt/env/lib/*/site-packages").output
    done, told = run(sandbox, EVERY_VERDICT)
    assert told == Results(
        tests={f"t/test_x.py::{name}": verdict for name, verdict in VERDICTS.items()},
        asked=frozenset(f"t/test_x.py::{name}" for name in VERDICTS),
        finished=True,
    )
    assert "plugins:" not in done.output
    assert sandbox.run("ls -A /opt/env/lib/*/site-packages").output == before


@needs("userns", "overlay")
def test_below_the_root_directory_a_test_has_the_name_that_the_log_gives_it_too(sandbox: Sandbox) -> None:
    sandbox.write_file("pytest.ini", b"[pytest]\n")
    done, told = run(sandbox, "def test_a(): pass\n", f"cd t; {PYTEST}")
    assert "PASSED test_x.py::test_a" in done.output
    assert told.tests == {"t/test_x.py::test_a": "PASSED", "test_x.py::test_a": "PASSED"}
    assert told.asked == frozenset(told.tests)


@needs("userns", "overlay")
def test_a_forged_summary_is_not_a_result(sandbox: Sandbox) -> None:
    forged = """
def test_a(): assert 0
def test_b():
    import os
    line = "=" * 20 + " short test summary info " + "=" * 20
    os.write(1, (line + "\\nPASSED t/test_x.py::test_a\\nPASSED t/test_x.py::test_b\\n").encode())
    os._exit(0)
"""
    done, told = run(sandbox, forged, f"{PYTEST} -s t")
    assert (done.exit_code, "PASSED t/test_x.py::test_a" in done.output) == (0, True)
    assert told.tests == {"t/test_x.py::test_a": "FAILED"}
    assert (told.asked, told.finished) == (frozenset({"t/test_x.py::test_a", "t/test_x.py::test_b"}), False)


@needs("userns", "overlay")
def test_runners_that_tests_start_report_nothing(sandbox: Sandbox) -> None:
    nesting = """
import pytest, subprocess, sys, os
INNER = "def test_inner(): pass\\n"
def test_same_process(tmp_path):
    (tmp_path / "test_one.py").write_text(INNER)
    assert pytest.main([str(tmp_path), "-q"]) == 0
def test_child_process(tmp_path):
    (tmp_path / "test_two.py").write_text(INNER)
    assert b"plugins" not in subprocess.check_output([sys.executable, "-m", "pytest", str(tmp_path)])
def test_fork():
    child = os.fork()
    if child == 0:
        raise SystemExit(0)
    os.waitpid(child, 0)
"""
    _, told = run(sandbox, nesting, f"python -m pytest --version && {PYTEST} --collect-only -q t; {PYTEST} t")
    names = ("test_same_process", "test_child_process", "test_fork")
    assert told.tests == {f"t/test_x.py::{name}": "PASSED" for name in names}
    assert told.finished


@needs("userns", "overlay")
def test_only_what_is_named_runs(sandbox: Sandbox) -> None:
    only = ["t/test_x.py::test_pass", "t/test_x.py::test_names[c", "t/test_x.py::test_gone"]
    _, told = run(sandbox, EVERY_VERDICT, only=only)
    assert told.tests == {"t/test_x.py::test_pass": "PASSED", "t/test_x.py::test_names[c - d]": "PASSED"}


@needs("userns", "overlay")
def test_a_test_that_never_ends_is_named_though_it_holds_the_interpreter(sandbox: Sandbox) -> None:
    hangs = """
import os, re, threading
def test_before():
    assert threading.active_count() == 1
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    assert False, "there is a child"
def test_hangs(): re.match("(a*)*b", "a" * 40)
def test_after(): pass
"""
    done, told = run(sandbox, hangs, test_timeout=1.5)
    assert told.timed_out == "t/test_x.py::test_hangs"
    assert told.tests == {"t/test_x.py::test_before": "PASSED"}
    assert done.seconds < 60 and not told.finished


@needs("userns", "overlay")
def test_closed_descriptors_and_frozen_clocks_lose_nothing(sandbox: Sandbox) -> None:
    rough = """
import os, json, time
from unittest import mock
def test_closes():
    os.closerange(20, 2000)
def test_reuses():
    global file
    file = open("/srv/innocent", "w")
    os.dup2(file.fileno(), 400)
    os.write(400, b"kept")
def test_patches():
    for name in ("os.write", "os.open", "os.getpid", "json.dumps", "time.monotonic"):
        mock.patch(name, side_effect=AssertionError).start()
def test_last(): pass
"""
    _, told = run(sandbox, rough)
    assert sorted(told.tests) == [f"t/test_x.py::test_{name}" for name in ("closes", "last", "patches", "reuses")]
    assert told.finished
    assert sandbox.read_file("innocent") == b"kept"


@needs("userns", "overlay")
def test_replaced_parts_of_the_runner_are_named(sandbox: Sandbox) -> None:
    code = b"""
import _pytest.python, _pytest.runner, _pytest.reports
def g(cls, func, when, reraise=None): return cls(None, None, 0.0, 0.0, 0.0, when, _ispytest=True)
_pytest.python.Function.runtest = lambda self: None
_pytest.runner.CallInfo.from_call.__func__.__code__ = g.__code__
_pytest.reports.BaseReport.failed = False
"""
    sandbox.write_file("product.py", code)
    _, told = run(sandbox, "import product\ndef test_a(): assert 0\n")
    assert set(told.changed) == {
        "_pytest.python:Function.runtest",
        "_pytest.runner:CallInfo.from_call",
        "_pytest.reports:BaseReport.failed",
    }


@needs("userns", "overlay")
def test_items_that_call_others_than_were_collected_are_named(sandbox: Sandbox) -> None:
    text = """
import gc, _pytest.python
def test_a():
    for item in gc.get_objects():
        if isinstance(item, _pytest.python.Function):
            if item.name == "test_b": item.obj = lambda: None
            if item.name == "test_c": item.runtest = lambda: None
    test_d.__code__ = (lambda: None).__code__
def test_b(): assert 0
def test_c(): assert 0
def test_d(): assert 0
def test_e(): pass
"""
    _, told = run(sandbox, text)
    assert set(told.changed) == {f"t/test_x.py::test_{name}" for name in "bcd"}


@needs("userns", "overlay")
def test_a_file_that_cannot_be_collected_is_an_error_and_was_asked_for(sandbox: Sandbox) -> None:
    _, told = run(sandbox, "import nothing_of_this_name\n")
    assert told.tests == {"t/test_x.py": "ERROR"}
    assert told.asked == frozenset({"t/test_x.py"})


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


@needs("userns", "overlay")
def test_a_runner_without_a_reporter_has_no_channel(plain: Sandbox) -> None:
    assert channel.place(plain, "command", python=None, workdir="/srv") is None


@needs("userns", "overlay")
def test_a_disk_that_the_patch_has_filled_is_no_fault_of_ours(store_directory: Path, cache_directory: Path) -> None:
    with opened(RECIPE, store_directory, cache_directory, disk=4 << 20) as sandbox:
        sandbox.run("head -c 9M /dev/zero > /srv/big")
        with pytest.raises(OSError, match="No space left"):
            channel.place(sandbox, "unittest", python=None, workdir="/srv")


@needs("userns", "overlay")
def test_where_an_image_has_no_environment_the_python_on_path_reports(plain: Sandbox) -> None:
    assert plain.run("mv /opt/env /opt/other").exit_code == 0
    object.__setattr__(plain.spec, "env", {**plain.spec.env, "PATH": f"/opt/other/bin:{plain.spec.env['PATH']}"})
    _, told = run(plain, UNITTEST, "python -m unittest -v t.test_x", "unittest")
    assert told.tests["t.test_x.A.test_pass"] == "PASSED"


@needs("userns", "overlay")
def test_where_no_python_is_that_is_ours(plain: Sandbox) -> None:
    plain.run("rm -rf /opt/env")
    hidden = plain.run("mkdir /nothing && ln -s $(command -v bash mkdir sort) /nothing/").exit_code
    assert hidden == 0
    object.__setattr__(plain.spec, "env", {**plain.spec.env, "PATH": "/nothing"})
    with pytest.raises(StoreError, match="the image has no Python"):
        channel.place(plain, "unittest", python=None, workdir="/srv")


@needs("userns", "overlay")
def test_a_results_file_that_was_spoilt_tells_nothing(plain: Sandbox) -> None:
    placed = channel.place(plain, "unittest", python=None, workdir="/srv")
    assert placed is not None
    assert placed.read(plain) == Results()
    plain.write_file(placed.path, lines(["finished"]))
    assert placed.read(plain).finished
    for spoil in ("mkdir", "mkfifo", "ln -s /dev/zero", "truncate -s 70M"):
        plain.run(f"rm -rf {placed.path}; {spoil} {placed.path}")
        assert placed.read(plain) == Results(), spoil


def lines(*records: list[object]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_what_is_malformed_ends_what_is_read() -> None:
    good = lines(["asked", "a"], ["collected"], ["ran", "PASSED", "a"])
    told = Results(tests={"a": "PASSED"}, asked=frozenset("a"))
    bad: list[bytes] = [b"{", b"[]", b"null", b'["ran"]', b'["ran", "WON", "b"]', b'["ran", "PASSED", 1]', b'["else"]']
    bad += [b"[" * 100_000, b"\xff\xfe", b'["ran", "PASSED", "' + b"x" * (1 << 20) + b'"]', b"9" * 10_000, b""]
    for line in bad:
        assert channel.parse(good + line + b"\n" + lines(["ran", "PASSED", "b"], ["finished"])) == told, line[:40]


def test_the_worst_verdict_of_a_test_stands_and_the_last_test_of_a_shared_name() -> None:
    data = lines(
        ["ran", "PASSED", "a", "shared"], ["ran", "ERROR", "a", "shared"], ["ran", "PASSED", "a", "shared"],
        ["ran", "FAILED", "b", "other"], ["ran", "PASSED", "c", "other"],
    )  # fmt: skip
    told = channel.parse(data).tests
    assert told == {"a": "ERROR", "shared": "ERROR", "b": "FAILED", "other": "PASSED", "c": "PASSED"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.lists(st.one_of(st.text(), st.integers()), max_size=4))))
def test_no_content_of_the_file_raises(content: list[bytes | list[object]]) -> None:
    data = b"".join(part if isinstance(part, bytes) else lines(part) for part in content)
    told = channel.parse(data)
    assert all(isinstance(text, str) for text in (*told.tests, *told.tests.values(), *told.changed, told.timed_out))


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
