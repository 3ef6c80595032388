"""`minisandbox grade`: a file of predictions becomes reports, rewards and a rate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from skyrl_minisandbox.rewards import TestReport
from tests.cli.conftest import Command
from tests.cli.kinds import ANSWER, FAMILY, GOLD, OTHER
from tests.support import needs

pytestmark = needs("userns", "overlay", "git")

WRONG = GOLD.replace("if true", "if [ 1 = 2 ]")
UNFIT = GOLD.replace("-if false", "-if maybe")


def predictions(path: Path, *patches: tuple[str, str | None]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"instance_id": task, "model_name_or_path": "m", "model_patch": patch}) + "\n"
            for task, patch in patches
        )
    )
    return path


def half(report: TestReport) -> float:
    """A reward of one's own."""
    good = [*report.fail_to_pass.values(), *report.pass_to_pass.values()]
    return sum(good) / len(good)


def outcomes(text: str) -> Mapping[str, str]:
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith(("good", "gold-fails"))}


@pytest.mark.ci
def test_each_prediction_gets_its_report_and_the_rate_counts_what_was_graded(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = predictions(
        tmp_path / "p.jsonl", ("good", GOLD), ("good", WRONG), ("good", UNFIT), ("good", None), ("gold-fails", GOLD)
    )
    arguments = ["grade", f"predictions={given}", f"tasks={FAMILY}", f"out={out}", *places]
    done = minisandbox(*arguments)
    assert done.code == 0, done.err
    expected = {
        "good": "resolved",
        "good+2": "unresolved",
        "good+3": "patch_failed",
        "good+4": "empty_patch",
        "gold-fails": "resolved",
    }
    assert outcomes(done.out) == expected
    assert done.out.splitlines()[-6:] == [
        "",
        "mean reward 0.400 over 5 of 5",
        "resolved 2 of 5 (40.0 %) of the graded patches",
        "resolved 2 of 6 (33.3 %) of all tasks; no prediction for 4 of them:",
        "  already-solved, hangs, has-a-future, not-built",
        "grades: DIR/out/grades",
    ]
    grades = {path.stem: json.loads(path.read_text()) for path in (out / "grades").iterdir()}
    assert {name: grade["outcome"] for name, grade in grades.items()} == expected
    assert grades["good+2"]["report"]["tests"] == {ANSWER: "FAILED", OTHER: "PASSED"}
    assert grades["good"]["report"]["command"] == "bash check.sh"
    assert grades["good+4"]["report"]["log"] == ""

    # Again: nothing is run. One lost and one changed: those two are.
    again = minisandbox(*arguments)
    assert again.out == done.out
    assert "patches to grade: 0" in again.err
    (out / "grades" / "good+2.json").unlink()
    predictions(
        given, ("good", GOLD), ("good", WRONG), ("good", GOLD), ("good", None), ("gold-fails", GOLD)
    )
    third = minisandbox(*arguments)
    assert "patches to grade: 2" in third.err
    assert outcomes(third.out) == {**expected, "good+3": "resolved"}
    # The reward is what is asked for now, without running anything.
    own = minisandbox(*arguments, "reward=tests.cli.test_grade.half", "--json")
    assert "patches to grade: 0" in own.err
    rewards = {row["rollout_id"]: row["reward"] for row in json.loads(own.out)}
    assert rewards == {"good": 1.0, "good+2": 0.5, "good+3": 1.0, "good+4": 0.0, "gold-fails": 1.0}
    # One that needs more than the reports have runs them again.
    more = minisandbox(*arguments, "tasks.ids=[gold-fails]", "reward=shaped")
    assert "patches to grade: 1" in more.err


@pytest.mark.ci
def test_what_could_not_be_graded_has_no_number_and_is_tried_again(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    given = predictions(tmp_path / "p.jsonl", ("good", GOLD), ("not-built", GOLD))
    arguments = ["grade", f"predictions={given}", f"tasks={FAMILY}", f"out={tmp_path}/out", *places]
    for number in (2, 1):
        done = minisandbox(*arguments, "--json")
        assert done.code == 1, done.err
        good, broken = json.loads(done.out)
        assert (good["outcome"], good["reward"]) == ("resolved", 1.0)
        assert (broken["outcome"], broken["reward"]) == ("infra_error", None)
        assert broken["error"].startswith("building image not-built: step `command 2/2` failed (exit code 3)")
        assert f"patches to grade: {number}" in done.err
    alone = minisandbox(*arguments, "tasks.ids=[not-built]")
    assert (alone.code, alone.out) == (1, "")
    assert "minisandbox: building image not-built" in alone.err


@pytest.mark.ci
def test_a_task_that_was_asked_for_and_has_no_prediction_is_not_what_was_asked(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    given = predictions(tmp_path / "p.jsonl", ("good", GOLD), ("gold-fails", GOLD))
    done = minisandbox("grade", f"predictions={given}", f"tasks={FAMILY}", "tasks.ids=[good,hangs]", *places)
    assert done.code == 1, done.err
    assert outcomes(done.out) == {"good": "resolved"}
    assert "resolved 1 of 2 (50.0 %) of all tasks; no prediction for 1 of them:\n  hangs" in done.out


def test_a_prediction_for_no_task_is_named(minisandbox: Command, places: list[str], tmp_path: Path) -> None:
    given = predictions(tmp_path / "p.jsonl", ("god", GOLD))
    done = minisandbox("grade", f"predictions={given}", f"tasks={FAMILY}", *places)
    assert (done.code, done.out) == (2, "")
    assert f"unknown task id `god` in `{FAMILY}`" in done.err
    assert "near names: good" in done.err
