"""`minisandbox explain`: what a person reads about one verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_minisandbox.cli.explain import WHY, explanation, find
from skyrl_minisandbox.cli.main import main, read
from skyrl_minisandbox.cli.run_directory import RunDirectory
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord, Seconds
from skyrl_minisandbox.rewards import Canary, TestReport
from tests.cli.conftest import Command
from tests.cli.kinds import ANSWER, FAMILY
from tests.support import needs

LOG = """\
collected 5 items
___ test_b ___
E       AssertionError: 1 != 2
FAILED t.py::test_b - AssertionError: 1 != 2
"""

REPORT = TestReport(
    outcome=Outcome.TAMPERED,
    tests={"t.py::test_a": "PASSED", "t.py::test_b": "FAILED", "t.py::test_c": "PASSED"},
    fail_to_pass={"t.py::test_a": True, "t.py::test_b": False},
    pass_to_pass={"t.py::test_c": True, "t.py::test_d": False},
    log=LOG,
    seconds=1.25,
    command="python -m pytest -rA t.py",
    exit_code=1,
    error="a canary that must fail passed: t.py::test_z",
    grading="protected",
    canaries=(Canary("t.py::test_y", "pass", "PASSED"), Canary("t.py::test_z", "fail", "PASSED")),
    retries={"t.py::test_d": ("FAILED", "")},
    dropped=("t.py::test_e",),
    restored=("conftest.py", "setup.cfg"),
    notes=("no channel for this runner",),
)

TEXT = """\
task.1: tampered, reward 0

why        the patch interfered with its own grading, so no result of it is believed
           a canary that must fail passed: t.py::test_z
rollout    ended by submit after 7 turns on node n1
grading    protected, 1.25 s
tests      python -m pytest -rA t.py
           ended with status 1
canaries   1 of 2 are wrong
           t.py::test_z must fail: PASSED
run again  t.py::test_d: FAILED, then -
put back   conftest.py
           setup.cfg
dropped    t.py::test_e
note       no channel for this runner

test          before  after
t.py::test_a  fails   PASSED
t.py::test_b  fails   FAILED        NOT PASSED
t.py::test_d  passes  not reported  NOT PASSED
and 1 that pass before and after
mended 1 of 2, still passing 1 of 2

from the log, 3 of 4 lines:
  | ___ test_b ___
  | E       AssertionError: 1 != 2
  | FAILED t.py::test_b - AssertionError: 1 != 2

what the agent did: DIR/run/trajectories/task.1.json
"""


def record(rollout_id: str, outcome: Outcome, reward: float | None, error: str = "") -> RolloutRecord:
    return RolloutRecord(rollout_id, "task", outcome, EndedBy.SUBMIT, reward, 7, Seconds(), "n1", error)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """With three rollouts: one tampered with, one of a task with a longer name, one that was never graded."""
    directory = RunDirectory(tmp_path / "run", {})
    directory.add(record("task.1", Outcome.TAMPERED, 0.0, REPORT.error), "m", {"report": REPORT.to_json()}, {})
    directory.add(record("task0.1", Outcome.TAMPERED, 0.0), "m", {"report": REPORT.to_json()}, {})
    lost = record("lost.1", Outcome.INFRA_ERROR, None, "node n1 is gone (hint: ray status)")
    directory.add(lost, "m", {}, {})
    directory.close()
    return directory.path


def test_the_whole_story_of_a_verdict(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "task", f"out={run_directory}"]) == 0
    assert capsys.readouterr().out.replace(str(run_directory.parent), "DIR") == TEXT


def test_every_test_is_shown_when_asked_for(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_directory / "grades" / "task.1.json"
    assert main(["explain", str(path), "--all"]) == 0
    out = capsys.readouterr().out
    assert "t.py::test_c  passes  PASSED\n" in out
    assert "that pass before and after" not in out


def test_what_was_never_graded_says_whose_fault_it_is(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "lost.1", f"out={run_directory}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lost.1: infra_error, no reward"
    assert lines[2] == f"why        {WHY[Outcome.INFRA_ERROR]}"
    assert lines[3] == "           node n1 is gone (hint: ray status)"


def test_json_is_what_the_run_directory_has(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "task.1", f"out={run_directory}", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert TestReport.from_json(data["report"]) == REPORT
    assert RolloutRecord.from_json(data).outcome is Outcome.TAMPERED


def test_every_outcome_has_its_sentence() -> None:
    assert set(WHY) == set(Outcome)


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ("other", "DIR has no rollout `other`", "grades/ there has lost.1, task.1, task0.1"),
        ("ta", "`ta` may be 2 rollouts of DIR", "one of task.1, task0.1"),
    ],
)
def test_a_rollout_that_is_none_or_several_is_told_with_those_that_are(
    run_directory: Path, argument: str, message: str, hint: str
) -> None:
    with pytest.raises(InputError) as raised:
        find(argument, str(run_directory))
    assert raised.value.message.replace(str(run_directory), "DIR") == message
    assert hint in raised.value.hint


def test_the_newest_run_is_meant_where_none_is_named(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run directory below"):
        find("task", "")
    for name in ("20260101-000000", "20260102-000000"):
        (tmp_path / "runs" / name / "grades").mkdir(parents=True)
        (tmp_path / "runs" / name / "grades" / "task.1.json").write_text("{}")
    assert find("task", "") == tmp_path / "runs" / "20260102-000000" / "grades" / "task.1.json"


@pytest.mark.parametrize("text", ["", "[]", '{"outcome": "resolved"}'])
def test_a_file_that_is_no_grade_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    assert main(["explain", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_grade_of_another_version_is_refused(tmp_path: Path) -> None:
    newer = {"outcome": "resolved", "report": {"outcome": "resolved", "unheard_of": 1}}
    for data in ({"outcome": "perfect", "report": None}, newer):
        with pytest.raises(InputError, match="was written by another version"):
            list(explanation(data, tmp_path / "a.json"))


def test_a_file_whose_path_has_an_equals_sign_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "a=b.json"
    path.write_text("{}")
    request = read("explain", [str(path), "out=x", "--all"])
    assert (request.argument, request.overrides, request.options) == (str(path), ("out=x",), frozenset({"--all"}))


def test_no_rollout_at_all_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 2
    assert "which rollout?" in capsys.readouterr().err


@pytest.mark.ci
@needs("userns", "overlay", "git")
def test_a_rollout_s_report_travels_whole_from_the_worker(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = minisandbox("rollout", "scaffold=wrong", f"tasks={FAMILY}", "tasks.ids=[good]", f"out={out}", *places)
    assert done.code == 0, done.err
    (path,) = (out / "grades").iterdir()
    report = TestReport.from_json(json.loads(path.read_text())["report"])
    assert (report.outcome, report.fail_to_pass) == (Outcome.UNRESOLVED, {ANSWER: False})
    assert (report.grading, report.command, report.exit_code) == ("protected", "bash check.sh", 0)
    told = minisandbox("explain", "good", f"out={out}")
    assert told.code == 0, told.err
    assert told.out.startswith(f"{path.stem}: unresolved, reward 0\n")
    assert f"{ANSWER}  fails   FAILED  NOT PASSED" in told.out
    assert f"  | FAILED {ANSWER}" in told.out
