"""What a patch is worth, and that nothing in one is an exception."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import InputError, SandboxError, TaskError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import TestReport, grade, load_reward
from skyrl_minisandbox.tasks.task import Task, Tests
from tests.rewards.conftest import RECIPE, Opener

CHECK = """\
diff --git a/tests/check.sh b/tests/check.sh
--- a/tests/check.sh
+++ b/tests/check.sh
@@ -1 +1,4 @@
-old
+echo "=== short test summary info ==="
+[ "$(cat keep.txt | head -1)" = ONE ] && echo "PASSED c::first" || echo "FAILED c::first - not ONE"
+[ "$(tail -1 keep.txt)" = three ] && echo "PASSED c::last" || echo "FAILED c::last - not three"
+exec bash tests/more.sh
diff --git a/tests/more.sh b/tests/more.sh
new file mode 100644
--- /dev/null
+++ b/tests/more.sh
@@ -0,0 +1 @@
+[ -e evil.sh ] && . ./evil.sh; true
"""

GOLD = """\
diff --git a/keep.txt b/keep.txt
--- a/keep.txt
+++ b/keep.txt
@@ -1,3 +1,3 @@
-one
+ONE
 two
 three
"""


def task(command: str = "bash tests/check.sh", timeout: float = 30.0, patch: str = CHECK) -> Task:
    return Task(
        id="graded",
        problem_statement="the first line should be ONE",
        recipe=RECIPE,
        tests=Tests(
            patch=patch,
            files=("tests/check.sh", "tests/more.sh"),
            command=command,
            runner="command",
            fail_to_pass=("c::first",),
            pass_to_pass=("c::last",),
            timeout=timeout,
        ),
        gold_patch=GOLD,
    )


def new_file(path: str, text: str, mode: str = "100644") -> str:
    lines = text.splitlines()
    body = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n"
        f"@@ -0,0 +1,{len(lines)} @@\n{body}"
    )


def test_gold_is_resolved_and_the_report_says_why(open_sandbox: Opener) -> None:
    report = grade(task(), GOLD, open_sandbox)
    assert report.outcome is Outcome.RESOLVED
    assert report.tests == {"c::first": "PASSED", "c::last": "PASSED"}
    assert (report.fail_to_pass, report.pass_to_pass) == ({"c::first": True}, {"c::last": True})
    assert (report.missing, report.failed, report.error) == ([], [], "")
    assert report.command == "bash tests/check.sh"
    assert report.exit_code == 0
    assert TestReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("patch", ["", "\n \n"])
def test_an_empty_patch_is_its_own_outcome_and_runs_nothing(patch: str) -> None:
    def never() -> None:
        raise AssertionError("a sandbox was asked for")

    report = grade(task(), patch, never)  # type: ignore[arg-type]
    assert report.outcome is Outcome.EMPTY_PATCH
    assert report.failed == ["c::first", "c::last"]


def test_an_empty_patch_is_run_when_asked_for(open_sandbox: Opener) -> None:
    report = grade(task(), "", open_sandbox, run_empty=True)
    assert report.outcome is Outcome.UNRESOLVED
    assert report.tests == {"c::first": "FAILED", "c::last": "PASSED"}
    assert "1 tests did not pass, the first is c::first" in report.error


def test_breaking_a_test_that_passed_is_unresolved(open_sandbox: Opener) -> None:
    report = grade(task(), GOLD.replace(" three\n", "-three\n+THREE\n"), open_sandbox)
    assert report.outcome is Outcome.UNRESOLVED
    assert report.failed == ["c::last"]


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (GOLD.replace("-one", "-other"), "keep.txt"),
        (GOLD.replace("keep.txt", "nowhere.txt"), "nowhere.txt: No such file"),
        ("this is no patch", "No valid patches"),
        (new_file("../../etc/evil", "x"), "../../etc/evil"),
        (new_file(".git/hooks/post-checkout", "x"), ".git/hooks"),
        (GOLD.replace("+ONE", "+\ud800"), "keep.txt"),
        (GOLD[:-8], "corrupt patch"),
    ],
    ids=["context", "no-file", "no-patch", "outside", "git", "surrogate", "cut"],
)
def test_a_patch_that_does_not_apply_is_told_with_its_reason(open_sandbox: Opener, patch: str, reason: str) -> None:
    report = grade(task(), patch, open_sandbox)
    if "\ud800" in patch:  # applies, with the half character replaced
        assert report.outcome is Outcome.UNRESOLVED
        return
    assert report.outcome is Outcome.PATCH_FAILED
    assert reason in report.error
    assert report.tests == {}
    assert report.command == ""


def test_bytes_that_are_no_text_survive(open_sandbox: Opener) -> None:
    patch = GOLD + new_file("latin.txt", "caf\udce9")
    command = "od -An -tx1 latin.txt; bash tests/check.sh"
    report = grade(task(command), patch, open_sandbox)
    assert report.outcome is Outcome.RESOLVED
    assert "63 61 66 e9 0a" in report.log


class TestTheTestsAreTheOriginalOnes:
    def test_a_patch_that_rewrites_the_tests_changes_nothing(self, open_sandbox: Opener) -> None:
        forged = "echo '=== short test summary info ==='; echo 'PASSED c::first'; echo 'PASSED c::last'"
        patch = CHECK.split("diff --git a/tests/more.sh")[0]
        patch = patch.replace("+exec bash tests/more.sh\n", f"+{forged}\n") + new_file("tests/more.sh", forged)
        assert grade(task(), patch, open_sandbox).outcome is Outcome.UNRESOLVED

    def test_a_patch_that_removes_the_tests_changes_nothing(self, open_sandbox: Opener) -> None:
        removed = (
            "diff --git a/tests/check.sh b/tests/check.sh\ndeleted file mode 100644\n"
            "--- a/tests/check.sh\n+++ /dev/null\n@@ -1 +0,0 @@\n-old\n"
        )
        report = grade(task(), removed + GOLD, open_sandbox)
        assert report.outcome is Outcome.RESOLVED

    def test_a_patch_that_puts_a_link_or_a_file_where_the_tests_are_changes_nothing(self, open_sandbox: Opener) -> None:
        removed = (
            "diff --git a/tests/check.sh b/tests/check.sh\ndeleted file mode 100644\n"
            "--- a/tests/check.sh\n+++ /dev/null\n@@ -1 +0,0 @@\n-old\n"
        )
        link = (
            "diff --git a/tests b/tests\nnew file mode 120000\n--- /dev/null\n+++ b/tests\n"
            "@@ -0,0 +1 @@\n+pkg\n\\ No newline at end of file\n"
        )
        for blocking in (link, new_file("tests", "a file")):
            report = grade(task(), removed + blocking + GOLD, open_sandbox)
            assert report.outcome is Outcome.RESOLVED, report

    def test_a_test_patch_that_does_not_fit_its_own_image_is_a_task_error(self, open_sandbox: Opener) -> None:
        with pytest.raises(TaskError, match="test patch of task `graded` does not fit its image"):
            grade(task(patch=CHECK.replace("-old", "-older")), GOLD, open_sandbox)


def evil(script: str) -> str:
    """The gold patch, and a script that the tests run at their end, as tested code would be."""
    return GOLD + new_file("evil.sh", script)


class TestWhateverThePatchDoesIsScored:
    def test_time(self, open_sandbox: Opener) -> None:
        report = grade(task(timeout=1.0), evil("sleep 600"), open_sandbox)
        assert report.outcome is Outcome.TESTS_TIMEOUT
        assert report.tests == {"c::first": "PASSED", "c::last": "PASSED"}  # what finished is kept
        assert "did not end within 1 s" in report.error

    @pytest.mark.ci
    @pytest.mark.parametrize(
        "script",
        [
            "kill -9 $$",
            "kill -9 -1",
            "kill -9 1; kill -9 $PPID",
            "head -c 1G /dev/zero > fill",
            "x=$(yes | head -c 1G | tr -d '\\n'); echo ${#x}",
            "for i in $(seq 500); do sleep 5 & done",
            "rm -rf / 2>/dev/null",
            "yes",
        ],
        ids=["itself", "everything", "init", "disk", "memory", "processes", "files", "output"],
    )
    def test_breaking_things(self, open_sandbox: Opener, script: str) -> None:
        report = grade(task(timeout=20.0), evil(script), open_sandbox, timeout=2.5)
        assert report.outcome in (Outcome.RESOLVED, Outcome.UNRESOLVED, Outcome.TESTS_TIMEOUT)
        assert load_reward("binary")(report) in (0.0, 1.0)

    def test_a_log_without_results(self, open_sandbox: Opener) -> None:
        report = grade(task("echo nothing; exit 3"), GOLD, open_sandbox)
        assert report.outcome is Outcome.UNRESOLVED
        assert report.missing == ["c::first", "c::last"]
        assert "nothing is told of any test, and the command ended with status 3" in report.error

    def test_a_patch_that_unpacks_to_more_than_the_disk(self, open_sandbox: Opener, tmp_path: Path) -> None:
        with open(tmp_path / "zeros", "wb") as file:
            file.truncate(200 << 20)
        command = ["git", "diff", "--no-index", "--binary", "/dev/null", "zeros"]
        patch = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout
        assert "GIT binary patch" in patch
        report = grade(task(), patch, open_sandbox)
        assert report.outcome in (Outcome.PATCH_FAILED, Outcome.UNRESOLVED)


def test_a_sandbox_that_cannot_be_made_is_an_exception() -> None:
    def broken() -> None:
        raise SandboxError("no room")

    with pytest.raises(SandboxError, match="no room"):
        grade(task(), GOLD, broken)  # type: ignore[arg-type]


def test_a_sandbox_that_dies_under_the_tests_is_scored_and_marked(open_sandbox: Opener) -> None:
    class Dying:
        """The real thing, closed by another hand when the tests begin."""

        def __init__(self) -> None:
            self.inner = open_sandbox()

        def __enter__(self) -> Dying:
            return self

        def __exit__(self, *args: object) -> None:
            self.inner.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def run(self, command: object, **options: object) -> object:
            if command == "bash tests/check.sh":
                self.inner.close()
            return self.inner.run(command, **options)  # type: ignore[arg-type]

    report = grade(task(), GOLD, Dying)  # type: ignore[arg-type]
    assert report.outcome is Outcome.UNRESOLVED
    assert report.sandbox_died
    assert "the sandbox died under the patch" in report.error


def report_of(outcome: Outcome) -> TestReport:
    return TestReport(outcome)


@pytest.mark.parametrize(
    ("outcome", "reward"),
    [(o, None if o is Outcome.INFRA_ERROR else 1.0 if o is Outcome.RESOLVED else 0.0) for o in Outcome],
    ids=str,
)
def test_binary_is_1_for_resolved_and_no_number_for_infra_error(outcome: Outcome, reward: float | None) -> None:
    assert load_reward("binary")(report_of(outcome)) == reward


def test_what_was_not_graded_has_no_reward() -> None:
    assert load_reward("binary")(None) is None


def nan_reward(report: TestReport) -> float:
    return float("nan")


def none_reward(report: TestReport) -> None:
    return None


@pytest.mark.parametrize("function", [nan_reward, none_reward])
def test_a_reward_of_ones_own_must_be_a_finite_number(function: Callable[[TestReport], object]) -> None:
    with pytest.raises(InputError, match="no finite number"):
        load_reward(f"{__name__}.{function.__name__}")(report_of(Outcome.UNRESOLVED))
