"""What is said of guests with another kernel: which there are, and what a run in one came to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.guest.image import KERNELS, GuestError, suite_of
from tests.guest.machine import Outcome
from tests.guest.suites import report
from tests.support import REPOSITORY, seconds

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.sandbox.test_run" name="test_one"/>
<testcase classname="tests.sandbox.test_run" name="test_two"><skipped message="needs ray: no ray"/></testcase>
</testsuite></testsuites>"""
BROKEN = """<testsuites><testsuite><testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_bad"><failure message="no"/></testcase></testsuite></testsuites>"""
NONE = "<testsuites><testsuite/></testsuites>"


def outcome(directory: Path, junit: str, status: int = 0, ended: bool = True) -> Outcome:
    (directory / "one").mkdir()
    (directory / "one/junit.xml").write_text(junit)
    run = {"name": "one", "who": "root", "place": "session", "exit": status, "ended": ended, "seconds": 3.0}
    return Outcome({"kernel": "6.1.0", "python": "3.11.2", "runs": [run]}, directory)


def test_a_kernel_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(GuestError, match=r"kernel 5\.10: .*below the oldest(.|\n)*6\.1 \(bookworm\)"):
        suite_of("5.10")
    for wanted in KERNELS:
        assert suite_of(wanted).name


@pytest.mark.parametrize(("words", "status"), [
    (["night", "--kernel", "5.10"], 3), (["night", "--kernel"], 3), (["ci", "--kernel", "6.1"], 2),
])
def test_a_wrong_kernel_is_told_before_anything_is_run(words: list[str], status: int) -> None:
    program = [str(REPOSITORY / "scripts/test"), *words]
    if status == 3:  # what scripts/guest comes to, without installing qemu for it
        program = [str(REPOSITORY / ".venv/bin/python"), "-m", "tests.guest", *words[2:], "--tests"]
        if not Path(program[0]).exists():
            pytest.skip("no .venv in this checkout")
    done = subprocess.run(program, capture_output=True, text=True, timeout=seconds(60), cwd=REPOSITORY, check=False)
    assert done.returncode == status and ("known are" in done.stderr or "night tier" in done.stderr), done.stderr


def test_a_run_that_passed_is_told_with_the_reasons_of_its_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(outcome(tmp_path, JUNIT), ["one"]) == []
    said = capsys.readouterr().out
    assert "Linux 6.1.0" in said and "1 passed, 0 failed, 1 skipped" in said and "skipped 1: needs ray: no ray" in said


def test_a_test_that_failed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(outcome(tmp_path, BROKEN, 1), ["one"]) == ["one"]
    assert "failed: tests.a::test_bad" in capsys.readouterr().out


@pytest.mark.parametrize(("junit", "status", "ended", "names"), [
    (NONE, 0, True, ["one"]), (JUNIT, 1, True, ["one"]), (JUNIT, 0, False, ["one"]), ("", 0, True, ["one"]),
    (JUNIT, 0, True, ["two"]),
], ids=["no test", "exit status", "over its time", "no report", "did not happen"])
def test_a_run_without_a_proof_has_failed(
    tmp_path: Path, junit: str, status: int, ended: bool, names: list[str]
) -> None:
    assert report(outcome(tmp_path, junit, status, ended), names) == names
