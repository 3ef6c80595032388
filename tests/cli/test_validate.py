"""`minisandbox validate`: each gate, each class of failure, on real tasks in real sandboxes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cli.gates import Bench, judge
from skyrl_minisandbox.cli.live_table import LiveTable
from skyrl_minisandbox.cli.validate import text_of
from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.images.recipe import Sdist
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.rewards.parsers import plain
from skyrl_minisandbox.sandbox import Limits, Sandbox
from skyrl_minisandbox.tasks import Task, load_tasks
from skyrl_minisandbox.tasks.pypi import TASK_FILES, read_task_file
from skyrl_minisandbox.tasks.validation import GATES, Validation
from tests.cli.conftest import Command
from tests.cli.kinds import ANSWER, FAMILY, OTHER, TESTS, recipe, task
from tests.support import REPOSITORY, needs

pytestmark = needs("userns", "overlay", "git")

OFFICIAL = GradingConfig(mode="official", retries=0)


class Judge:
    """Judges tasks whose tests may read in `/count` how many sandboxes there were before theirs."""

    def __init__(self, store: Path, cache: Path) -> None:
        self.store, self.cache = Store(store), Cache(cache)
        self.gates: dict[str, bool] = {}

    def __call__(self, one: Task, grading: GradingConfig = OFFICIAL, *, reports: bool = False) -> Validation:
        sources = Sources(self.cache.path / "sources")
        image = build_image(one.recipe, store=self.store, cache=self.cache, pythons=(), progress=None, sources=sources)
        count = itertools.count()
        with self.cache.checkout(image, self.store) as checkout, contextlib.ExitStack() as stack:
            limits = Limits(memory=512 << 20, disk=64 << 20, processes=128)

            def open_sandbox() -> Sandbox:
                sandbox = stack.enter_context(Sandbox(checkout.sandbox_spec(limits=limits)))
                sandbox.write_file("/count", f"{next(count)}\n".encode())
                return sandbox

            bench = Bench(open_sandbox, open_sandbox, grading, reports=reports, gate=self.gates.__setitem__)
            return judge(one, image.digest, bench)


@pytest.fixture
def judged(store_directory: Path, cache_directory: Path) -> Judge:
    return Judge(store_directory, cache_directory)


def test_a_good_task_passes_every_gate(judged: Judge) -> None:
    row = judged(task("good"))
    assert (row.valid, row.failure, row.error, row.gates()) == (True, "", "", [True] * 4)
    assert judged.gates == dict.fromkeys(GATES, True)
    assert (row.runs, row.flaky, row.already_pass) == (4, (), ())
    assert row.task_digest == task("good").digest()


@pytest.mark.ci
def test_a_flaky_test_is_dropped_and_the_task_judges_without_it(judged: Judge) -> None:
    unsteady = "check.sh::unsteady"
    row = judged(task("unsteady", tests={**TESTS, unsteady: "[ $(($(cat /count) % 2)) = 0 ]"}))
    assert (row.valid, row.flaky, row.gates()) == (True, (unsteady,), [True] * 4)
    assert row.runs == 6  # empty and gold once more, without it


@pytest.mark.ci
def test_a_test_that_only_passes_when_run_again_is_flaky_though_grading_forgives_it(judged: Judge) -> None:
    unsteady = "check.sh::unsteady"
    # A sandbox each: empty 0, gold 1, again alone 2, gold 3, again alone 4: every gold is resolved in the end.
    row = judged(task("forgiven", tests={**TESTS, unsteady: "[ $(($(cat /count) % 2)) = 0 ]"}), GradingConfig())
    assert (row.valid, row.flaky) == (True, (unsteady,))


@pytest.mark.ci
def test_a_fail_to_pass_test_that_is_flaky_leaves_no_task(judged: Judge) -> None:
    odd = {ANSWER: "[ $(($(cat /count) % 2)) = 0 ]", OTHER: TESTS[OTHER]}
    row = judged(task("odd", tests=odd))
    assert (row.valid, row.failure, row.repeats) == (False, "flaky", False)
    assert row.error == f"every fail-to-pass test comes out now so, now so: {ANSWER}"
    assert any(ANSWER in line for line in row.log)


@pytest.mark.ci
def test_tests_that_go_on_being_flaky_reject_the_task(judged: Judge) -> None:
    many = {f"check.sh::t{n}": f"[ $(cat /count) != {n} ]" for n in range(12)}  # each run fails another one
    row = judged(task("many", tests={**TESTS, **many}))
    assert (row.valid, row.failure, row.repeats, row.runs) == (False, "flaky", False, 8)
    assert len(row.flaky) == 8
    assert row.error.startswith("tests still come out now so, now so after 8 were dropped")


@pytest.mark.ci
def test_a_bug_that_hangs_is_a_task_if_the_fix_does_not(judged: Judge) -> None:
    row = judged(task("hangs-unpatched", setup="grep -q false answer.sh && sleep 60", timeout=1.0))
    assert (row.valid, row.gates(), row.runs) == (True, [True] * 4, 3)


@pytest.mark.ci
def test_a_fail_to_pass_test_that_passes_already_is_told_where_others_do_not(judged: Judge) -> None:
    row = judged(task("half", fail_to_pass=(ANSWER, OTHER)))
    assert (row.valid, row.already_pass) == (True, (OTHER,))
    assert f"pass without the patch too:\n    {OTHER}" in text_of([row])


@pytest.mark.ci
def test_a_test_patch_that_does_not_fit_its_image_is_the_task_s_fault(judged: Judge) -> None:
    one = task("unfit")
    # As if the repository had been at another commit: the patch changes a file that is not there.
    moved = one.tests.patch.replace("new file mode 100644\n", "").replace("/dev/null", "a/check.sh")
    tests = one.tests.model_copy(update={"patch": moved.replace("@@ -0,0 +1,4 @@", "@@ -1,1 +1,4 @@")})
    row = judged(one.model_copy(update={"tests": tests}))
    assert (row.valid, row.failure) == (False, "gold_fails")
    assert "does not fit its image" in row.error


@pytest.mark.ci
@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("git tag v2", "tag v2"),
        ("git remote add origin https://example.invalid/r.git", "remote origin"),
        ("git stash list; echo fixed > answer.sh; git add answer.sh; git reset -q --hard", "blob "),
    ],
)
def test_whatever_leads_beyond_head_is_found(judged: Judge, command: str, line: str) -> None:
    row = judged(task("future", made=recipe(commands=(command,))))
    assert (row.valid, row.failure, row.no_future) == (False, "future_reachable", False)
    assert row.log[0].startswith(line)
    assert row.error == f"HEAD does not lead to {row.log[0]}"


@pytest.mark.ci
@needs("network")
def test_every_class_of_failure_is_told_with_the_lines_that_show_it(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = minisandbox("validate", f"tasks={FAMILY}", f"out={out}", *places)
    assert done.code == 1, done.err
    rows = {row["task_id"]: Validation.model_validate(row) for row in json.loads((out / "validation.json").read_text())}
    assert {name: row.failure for name, row in rows.items()} == {
        "good": "",
        "already-solved": "empty_passes",
        "gold-fails": "gold_fails",
        "hangs": "timeout",
        "has-a-future": "future_reachable",
        "not-built": "build_failed",
    }
    assert [name for name, row in rows.items() if row.valid] == ["good"]
    shown = {
        "already-solved": f"PASSED {ANSWER}",
        "gold-fails": f"FAILED {ANSWER}",
        "has-a-future": "the fix",
        "not-built": "there is no such compiler",
    }
    for name, text in shown.items():
        assert any(text in line for line in rows[name].log), (name, rows[name].log)
    assert rows["hangs"].error == "the gold patch: the tests did not end within 1 s"
    assert (rows["good"].modes_agree, rows["good"].wrong_fails, rows["good"].needs_network) == (True, True, False)
    assert (out / "validation.txt").read_text() in done.out
    assert done.out.splitlines()[-2:] == [
        "1 of 6 tasks are valid, 1 build failed, 1 empty passes, 1 future reachable, 1 gold fails, 1 timeout",
        "report: DIR/out/validation.json",
    ]
    # What trains or exports takes only what passed.
    listed = minisandbox("tasks", "list", f"tasks={FAMILY}", f"tasks.validation={out}/validation.json", "--json")
    assert [one["id"] for one in json.loads(listed.out)] == ["good"]


@pytest.mark.ci
@needs("network")
def test_a_validation_that_was_killed_goes_on_where_it_was(
    minisandbox: Command, places: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["validate", "--gates-only", f"tasks={FAMILY}", f"out={out}", "parallel=1", *places]
    ids = "tasks.ids=[good,already-solved,gold-fails]"
    watched = [sys.executable, "-m", "tests.orphans", "10", sys.executable, "-m", "skyrl_minisandbox.cli.main"]
    process = subprocess.Popen(
        [*watched, *arguments, ids], cwd=REPOSITORY, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("  good: valid"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "validation.json").exists()
    with (out / "validation.jsonl").open("a") as file:
        file.write('{"task_id": "already-sol')  # as a disk that was full would leave it
    done = minisandbox(*arguments, ids)
    assert done.code == 1
    assert "(1 empty_passes, 1 gold_fails, 1 by an earlier run)" in done.err
    assert "good: tests" not in done.err
    rows = json.loads((out / "validation.json").read_text())
    assert [(row["task_id"], row["valid"]) for row in rows] == [
        ("good", True),
        ("already-solved", False),
        ("gold-fails", False),
    ]
    # Another way to grade, or the reports, are another question.
    again = minisandbox(*arguments, "tasks.ids=[good]", "grading=official")
    assert again.code == 0 and "good: tests: gold" in again.err
    again = minisandbox(*[one for one in arguments if one != "--gates-only"], "tasks.ids=[good]", "grading=official")
    assert again.code == 0 and "good: tests: wrong" in again.err


ORDERED = """\
diff --git a/test_ordered.py b/test_ordered.py
new file mode 100644
--- /dev/null
+++ b/test_ordered.py
@@ -0,0 +1,12 @@
+import pytest
+
+seen = []
+
+
+@pytest.mark.parametrize("number", range(12))
+def test_in_turn(number):
+    seen.append(number)
+    assert seen == list(range(number + 1))
+
+def test_whenever():
+    assert True
"""


@pytest.mark.ci
@needs("network")
def test_tests_that_need_their_order_are_told_and_no_gate(judged: Judge) -> None:
    (real,) = load_tasks("pypi", ids=["inflection-0.3.1"])
    names = [f"test_ordered.py::test_in_turn[{number}]" for number in range(12)]
    more = {
        "patch": real.tests.patch + ORDERED,
        "files": (*real.tests.files, "test_ordered.py"),
        "command": f"{real.tests.command} test_ordered.py",
        "pass_to_pass": (*real.tests.pass_to_pass, *names, "test_ordered.py::test_whenever"),
    }
    row = judged(real.model_copy(update={"tests": real.tests.model_copy(update=more)}), GradingConfig(), reports=True)
    assert (row.valid, row.error, row.flaky) == (True, "", ())
    assert row.order == "shuffled"
    assert set(row.order_matters) <= set(names) and len(row.order_matters) > 1
    assert (row.modes_agree, row.differences, row.wrong_fails, row.needs_network) == (True, (), True, False)
    assert "fail when shuffled:\n    test_ordered.py::test_in_turn[" in text_of([row])


UNSTEADY = """\
diff --git a/test_unsteady.py b/test_unsteady.py
new file mode 100644
--- /dev/null
+++ b/test_unsteady.py
@@ -0,0 +1,6 @@
+def test_by_chance():
+    with open("/count") as file:
+        assert int(file.read()) % 2 == 0
+
+def test_always():
+    assert True
"""

HARMLESS = """\
diff --git a/NOTES b/NOTES
new file mode 100644
--- /dev/null
+++ b/NOTES
@@ -0,0 +1 @@
+nothing that a test looks at
"""


@pytest.mark.ci
@needs("network")
def test_a_real_task_that_starts_from_the_fixed_release_is_rejected(judged: Judge) -> None:
    (real,) = load_tasks("pypi", ids=["inflection-0.3.1"])
    fixed = read_task_file(TASK_FILES / "inflection-0.3.1.yaml").fix
    release = Sdist(package="inflection", **fixed.model_dump())
    tests = real.tests.model_copy(update={"patch": ""})  # that release brings them
    recipe = real.recipe.model_copy(update={"repository": release})
    row = judged(real.model_copy(update={"recipe": recipe, "tests": tests, "gold_patch": HARMLESS}), GradingConfig())
    assert (row.valid, row.failure, row.gates()) == (False, "empty_passes", [False, True, True, True])
    assert set(row.already_pass) == set(real.tests.fail_to_pass)


@pytest.mark.ci
@needs("network")
def test_a_flaky_test_of_a_real_task_is_dropped_and_the_rest_is_a_task(judged: Judge) -> None:
    (real,) = load_tasks("pypi", ids=["inflection-0.3.1"])
    more = {
        "patch": real.tests.patch + UNSTEADY,
        "files": (*real.tests.files, "test_unsteady.py"),
        "command": f"{real.tests.command} test_unsteady.py",
        "pass_to_pass": (
            *real.tests.pass_to_pass, "test_unsteady.py::test_by_chance", "test_unsteady.py::test_always"
        ),
    }  # fmt: skip
    row = judged(real.model_copy(update={"tests": real.tests.model_copy(update=more)}), GradingConfig())
    assert (row.valid, row.error, row.flaky) == (True, "", ("test_unsteady.py::test_by_chance",))


@pytest.mark.ci
@needs("network")
def test_a_real_task_from_whose_history_the_fix_can_be_read_is_rejected(judged: Judge) -> None:
    (real,) = load_tasks("pypi", ids=["inflection-0.3.1"])
    later = (
        f"git switch -q -c later && git apply <<'END'\n{real.gold_patch}END\n"
        "git -c user.name=one -c user.email=one@example.invalid commit -q -a -m 'the fix' && git switch -q -"
    )
    row = judged(real.model_copy(update={"recipe": real.recipe.model_copy(update={"commands": (later,)})}))
    assert (row.valid, row.failure, row.gates()) == (False, "future_reachable", [True, True, True, False])
    assert row.log[0].startswith("commit ") and row.log[0].endswith("the fix")


class Terminal:
    """A stream that says it is a terminal and keeps what it is told."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    yield Terminal()


def test_a_terminal_shows_what_runs_and_which_gates_are_decided(terminal: Any) -> None:
    with LiveTable("tasks to validate", GATES, 3, earlier=1, stream=terminal) as table:
        table.say("one", "tests: gold")
        table.gate("one", "empty_fails", True)
        table.gate("one", "repeats", False)
        table.say("two", "later commits")
        assert table._live is not None
        table._live.refresh()
        shown = terminal.text
        table.done("two", "gold_fails", "[red] is no colour here")
    rows = {line.split()[0]: line.split() for line in plain(shown).splitlines() if line.strip()}
    assert rows["task"][:6] == ["task", "empty", "fails", "gold", "passes", "repeats"]
    assert rows["one"][1:5] == ["yes", "…", "NO", "…"]
    assert rows["two"][1:] == ["…", "…", "…", "…", "later", "commits", "0"]
    assert "two: gold_fails: [red] is no colour here" in plain(terminal.text)
    assert "tasks to validate: 2 of 3 (1 gold_fails, 1 by an earlier run), in 0." in terminal.text
