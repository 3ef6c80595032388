"""Verdicts that are kept: which, for what, for how long, and what a damaged one is worth."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_minisandbox.config import GradingConfig, RewardConfig
from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import Canary, TestReport, memo
from skyrl_minisandbox.rewards.memo import KEPT, NOTE, Memo, memo_at, memo_key
from skyrl_minisandbox.sandbox import Limits
from skyrl_minisandbox.tasks.task import Task
from skyrl_minisandbox.turn import Finished
from tests.small import SOLVE, AtOnce, build_small_image, request, small_task
from tests.support import REPOSITORY, needs

pytestmark = pytest.mark.ci  # the fast tier has five minutes for all rooms

KEY = "a" * 64

REPORT = TestReport(
    Outcome.UNRESOLVED,
    tests={"f": "FAILED", "p é": "PASSED"},
    fail_to_pass={"f": False},
    pass_to_pass={"p é": True},
    log="one\ntwo \udce9\n",
    seconds=1.5,
    command="pytest",
    exit_code=1,
    error="1 tests did not pass, the first is f",
    grading="protected",
    canaries=(Canary("c", "fail", "FAILED"),),
    retries={"p é": ("FAILED", "PASSED")},
    compiled=True,
    notes=("a note",),
)


def key_of(**changes: Any) -> str:
    given: dict[str, Any] = {
        "task": small_task(), "image": "sha256:1", "patch": "p", "grading": GradingConfig(), "limits": Limits(),
        **changes,
    }  # fmt: skip
    return memo_key(given.pop("task"), given.pop("image"), given.pop("patch"), **given)


def other(**tests: Any) -> Task:
    task = small_task()
    return task.model_copy(update={"tests": task.tests.model_copy(update=tests)})


class TestTheKey:
    @pytest.mark.parametrize(
        "changes",
        [
            {"image": "sha256:2"},
            {"patch": "p\n"},
            {"patch": "p\udce9"},
            {"grading": GradingConfig(mode="official")},
            {"grading": GradingConfig(retries=0)},
            {"grading": GradingConfig(patch="fuzzy")},
            {"limits": Limits(memory=1 << 30, disk=1 << 20)},
            {"timeout": 3.0},
            {"needs": ("compiled",)},
            {"task": other(command="bash ./check.sh")},
            {"task": other(pass_to_pass=())},
            {"task": other(flaky=("check.sh::other",), pass_to_pass=())},
            {"task": other(timeout=31.0)},
            {"task": other(patch="")},
            {"task": small_task().model_copy(update={"gold_patch": ""})},
        ],
        ids=str,
    )
    def test_differs_with_everything_that_a_verdict_hangs_on(self, changes: dict[str, Any]) -> None:
        assert key_of(**changes) != key_of()

    def test_is_the_same_for_tasks_with_the_same_tests_in_the_same_image(self) -> None:
        assert key_of(task=small_task("small-2")) == key_of()
        assert key_of(task=small_task().model_copy(update={"problem_statement": "other words"})) == key_of()

    def test_differs_when_the_code_that_judges_does(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        before = key_of()
        (tmp_path / "judge.py").write_text("")
        monkeypatch.setattr(memo, "__file__", str(tmp_path / "memo.py"))
        memo._code.cache_clear()
        try:
            assert key_of() != before
        finally:
            monkeypatch.undo()
            memo._code.cache_clear()
        assert key_of() == before

    def test_is_a_plain_file_name(self) -> None:
        assert set(key_of()) <= set("0123456789abcdef") and len(key_of()) == 64


class TestWhatIsKept:
    @pytest.mark.parametrize("anew", [False, True], ids=["memory", "disk"])
    def test_comes_back_whole_with_a_note(self, tmp_path: Path, anew: bool) -> None:
        kept = Memo(tmp_path)
        assert kept.get(KEY) is None
        assert kept.put(KEY, REPORT)
        found = (Memo(tmp_path) if anew else kept).get(KEY)
        assert found == dataclasses.replace(REPORT, notes=("a note", NOTE))
        assert kept.get("b" * 64) is None

    @pytest.mark.parametrize("outcome", Outcome, ids=str)
    def test_is_a_verdict_of_tests_that_ran_to_their_end(self, tmp_path: Path, outcome: Outcome) -> None:
        kept = Memo(tmp_path)
        wanted = outcome in (Outcome.RESOLVED, Outcome.UNRESOLVED, Outcome.TAMPERED)
        assert kept.put(KEY, dataclasses.replace(REPORT, outcome=outcome)) is wanted
        assert (kept.get(KEY) is not None) is wanted
        assert [path.name for path in tmp_path.iterdir()] == [KEY] * wanted

    def test_is_never_one_of_a_sandbox_that_died(self, tmp_path: Path) -> None:
        assert not Memo(tmp_path).put(KEY, dataclasses.replace(REPORT, sandbox_died=True))
        assert list(tmp_path.iterdir()) == []

    def test_is_not_a_report_of_absurd_size(self, tmp_path: Path) -> None:
        noise = os.urandom(memo.LARGEST_ENTRY).hex()
        assert not Memo(tmp_path).put(KEY, dataclasses.replace(REPORT, log=noise))
        assert list(tmp_path.iterdir()) == []

    def test_the_last_one_counts(self, tmp_path: Path) -> None:
        kept = Memo(tmp_path)
        kept.put(KEY, REPORT)
        kept.put(KEY, dataclasses.replace(REPORT, outcome=Outcome.RESOLVED))
        for one in (kept, Memo(tmp_path)):
            found = one.get(KEY)
            assert found is not None and found.outcome is Outcome.RESOLVED

    def test_nobody_else_may_read_it(self, tmp_path: Path) -> None:
        Memo(tmp_path / "cache" / "memo").put(KEY, REPORT)
        assert (tmp_path / "cache" / "memo").stat().st_mode & 0o077 == 0


def names(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


class TestBounds:
    def test_the_one_used_longest_ago_goes_first(self, tmp_path: Path) -> None:
        kept = Memo(tmp_path, most_entries=3)
        one, two, three, four = names(4)
        for age, key in ((300, one), (200, two), (100, three)):
            kept.put(key, REPORT)
            os.utime(tmp_path / key, (time.time() - age,) * 2)
        assert Memo(tmp_path).get(one) is not None  # used now
        kept.put(four, REPORT)
        assert {path.name for path in tmp_path.iterdir()} == {one, three, four}

    def test_all_together_have_a_size(self, tmp_path: Path) -> None:
        Memo(tmp_path).put(KEY, REPORT)
        size = (tmp_path / KEY).stat().st_size
        kept = Memo(tmp_path, most_bytes=5 * size)
        for age, key in enumerate(names(20)):
            kept.put(key, REPORT)
            os.utime(tmp_path / key, (time.time() - 1000 + age,) * 2)
        left = [path.name for path in tmp_path.iterdir()]
        assert len(left) == 5
        assert names(20)[-1] in left

    def test_memory_has_one_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memo, "_MEMORY_ENTRIES", 4)
        kept = Memo(tmp_path)
        for key in names(9):
            kept.put(key, REPORT)
        assert list(kept._memory) == names(9)[-4:]
        assert kept._memory_bytes == sum(map(len, kept._memory.values()))
        monkeypatch.setattr(memo, "_MEMORY_BYTES", kept._memory_bytes // 2)
        kept.put(KEY, REPORT)
        assert kept._memory_bytes <= memo._MEMORY_BYTES
        assert kept.get(names(9)[0]) is not None  # the directory still has it

    def test_what_a_killed_writer_left_goes_after_a_while(self, tmp_path: Path) -> None:
        old, young = tmp_path / f".{KEY}.1", tmp_path / f".{KEY}.2"
        old.write_bytes(b"half")
        young.write_bytes(b"half")
        os.utime(old, (time.time() - 2 * memo._ABANDONED,) * 2)
        Memo(tmp_path, most_entries=1).put(KEY, REPORT)
        assert {path.name for path in tmp_path.iterdir()} == {KEY, young.name}


def sealed(packed: bytes) -> bytes:
    return hashlib.sha256(packed).digest() + packed


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Where a good one lies, and its bytes."""
    directory = tmp_path_factory.mktemp("memo")
    Memo(directory).put(KEY, REPORT)
    return directory / KEY, (directory / KEY).read_bytes()


class TestDamage:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_a_damaged_entry_is_a_miss_and_goes(self, entry: tuple[Path, bytes], data: st.DataObject) -> None:
        path, good = entry
        place = data.draw(st.integers(0, len(good) - 1))
        kind = data.draw(st.sampled_from(["cut", "flip", "more", "gap"]))
        bit = 1 << data.draw(st.integers(0, 7))
        bad = {
            "cut": good[:place],
            "flip": good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :],
            "more": good + good[: place + 1],
            "gap": good[:place] + good[place + 1 :],
        }[kind]
        path.write_bytes(bad)
        assert Memo(path.parent).get(KEY) is None
        assert not path.exists()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            os.urandom(32),
            sealed(b"no zlib"),
            sealed(zlib.compress(b"no json")),
            sealed(zlib.compress(b"[1, 2]")),
            sealed(zlib.compress(b'{"outcome": "resolved", "surprise": 1}')),
            sealed(zlib.compress(b'{"outcome": "splendid"}')),
            sealed(zlib.compress(json.dumps({"outcome": "infra_error"}).encode())),
            sealed(zlib.compress(json.dumps({"outcome": "tests_timeout"}).encode())),
            sealed(zlib.compress(b'{"outcome": "resolved"}')[:-2]),
            sealed(zlib.compress(b" " * (memo._LARGEST_REPORT + 1))),
        ],
        ids=["empty", "noise", "zlib", "json", "list", "field", "outcome", "infra", "timeout", "cut", "bomb"],
    )
    def test_what_was_never_a_report_of_ours_is_a_miss(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / KEY).write_bytes(content)
        kept = Memo(tmp_path)
        assert kept.get(KEY) is None
        assert list(tmp_path.iterdir()) == []
        kept.put(KEY, REPORT)
        assert Memo(tmp_path).get(KEY) is not None

    def test_where_nothing_can_be_written_memory_does_and_it_is_said_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("not a directory")
        kept = Memo(tmp_path / "file" / "memo")
        with caplog.at_level(logging.WARNING):
            for key in names(3):
                assert kept.put(key, REPORT)
        assert all(kept.get(key) is not None for key in names(3))
        assert [record.message for record in caplog.records if "kept in memory alone" in record.message]
        assert len(caplog.records) == 1

    @pytest.mark.ci
    def test_processes_share_a_directory_without_harm(self, tmp_path: Path) -> None:
        """Four of them write, read and prune the same names at the same time; what is left is whole."""
        program = (
            "import sys, pathlib\n"
            "from tests.rewards.test_memo import Memo, REPORT, names\n"
            "for _ in range(3):\n"
            "    for key in names(12):\n"
            "        kept = Memo(pathlib.Path(sys.argv[1]), most_entries=6)\n"
            "        kept.put(key, REPORT)\n"
            "        found = Memo(kept.directory).get(key)\n"
            "        assert found is None or found.log == REPORT.log\n"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.PIPE)
            for _ in range(4)
        ]
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
        left = list(tmp_path.iterdir())
        assert len(left) == 6
        assert all(Memo(tmp_path).get(path.name) is not None for path in left)


def noisy_task(extra: str = "", *, timeout: float = 30.0) -> Task:
    """The small task; its log is another one in every run."""
    task = small_task(timeout=timeout)
    patch = task.tests.patch.replace("+1,3 @@", "+1,4 @@") + f"+cat /proc/sys/kernel/random/uuid{extra}\n"
    return task.model_copy(update={"tests": task.tests.model_copy(update={"patch": patch})})


Play = Callable[..., Finished]


@needs("userns", "overlay", "git")
class TestInARollout:
    @pytest.fixture
    def play(self, store_directory: Path, cache_directory: Path) -> Play:
        build_small_image(store_directory, cache_directory)
        store, cache = Store(store_directory), Cache(cache_directory)

        def played(task: Task, command: str = SOLVE, *, memo: bool = True, **changes: Any) -> Finished:
            asked = request(task, reward=RewardConfig(memo=memo), **changes)
            rollout = AtOnce(asked, store=store, cache=cache, node="here")
            try:
                rollout.open()
                rollout.step(command)
                turn = rollout.step("submit")
            finally:
                rollout.abort()
            assert turn.finished is not None
            return turn.finished

        return played

    @pytest.fixture(autouse=True)
    def fresh(self, cache_directory: Path) -> None:
        memo_at.cache_clear()
        for path in (cache_directory / "memo").glob("*"):
            path.unlink()

    @pytest.mark.parametrize("command", [SOLVE, "echo no > answer.sh"], ids=["resolved", "unresolved"])
    def test_the_same_patch_is_not_run_again(self, play: Play, command: str) -> None:
        first, second = play(noisy_task(), command), play(noisy_task(), command)
        memo_at.cache_clear()  # as in another worker process of the node
        third = play(noisy_task(), command)
        assert first.log == second.log == third.log != ""
        assert first.record.reward == second.record.reward == third.record.reward == float(command == SOLVE)
        assert first.tests == second.tests
        assert first.report is not None and second.report is not None
        assert NOTE not in first.report["notes"] and NOTE in second.report["notes"]

    def test_it_is_run_where_nobody_asked_for_it_to_be_kept(self, play: Play) -> None:
        assert play(noisy_task(), memo=False).log != play(noisy_task(), memo=False).log
        play(noisy_task())
        assert play(noisy_task(), memo=False).log != play(noisy_task()).log

    def test_another_patch_is_run(self, play: Play) -> None:
        assert play(noisy_task()).log != play(noisy_task(), f"{SOLVE}; echo more > new.txt").log

    def test_another_way_to_grade_is_run(self, play: Play) -> None:
        official = GradingConfig(mode="official", retries=0)
        assert play(noisy_task()).log != play(noisy_task(), grading=official).log

    @pytest.mark.ci
    def test_a_time_out_is_run_again(self, play: Play) -> None:
        task = noisy_task("; sleep 60", timeout=0.7)
        first, second = play(task), play(task)
        assert first.record.outcome is second.record.outcome is Outcome.TESTS_TIMEOUT
        assert first.log != second.log

    def test_an_empty_patch_is_none_of_its_business(self, play: Play, cache_directory: Path) -> None:
        for _ in range(2):
            assert play(noisy_task(), "true").record.outcome is Outcome.EMPTY_PATCH
        assert list((cache_directory / "memo").glob("*")) == []

    def test_what_is_kept_is_what_may_be(self) -> None:
        assert {Outcome.RESOLVED, Outcome.UNRESOLVED, Outcome.TAMPERED} == KEPT
