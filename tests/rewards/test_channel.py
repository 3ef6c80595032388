"""Results come over a file that the tests' output cannot write, from real runners in real sandboxes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.rewards import channel
from skyrl_minisandbox.rewards.channel import Results
from skyrl_minisandbox.sandbox import Sandbox
from tests.rewards.channels import EVERY_VERDICT, PYTEST, RECIPE, UNITTEST, VERDICTS, opened, run
from tests.support import needs


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
