"""Every row of the table of faults, driven: nothing of the agent's is masked, nothing of ours is a number.

Here are those that one process can show; tests/chaos/test_faults.py has the deaths of workers and nodes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.config import GradingConfig, RewardConfig, RolloutConfig
from skyrl_minisandbox.errors import (
    BuildError,
    CorruptLayer,
    DiskFull,
    MachineError,
    NodeError,
    NodeLost,
    OutOfMemory,
    PluginError,
    PolicyError,
    SandboxError,
    SandboxGone,
    StoreError,
    TaskError,
    WorkerLost,
)
from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.record import Outcome, RolloutRecord
from skyrl_minisandbox.rewards import fault
from skyrl_minisandbox.rewards.fault import Event, event_of, needs_its_own_worker, outcome_of, reward_of
from skyrl_minisandbox.rollout import Rollout
from skyrl_minisandbox.sandbox import Limits, shutdown_launcher
from skyrl_minisandbox.tasks.task import Task
from skyrl_minisandbox.turn import Finished
from tests.ancestry import init_above, kill, launcher_above, marked
from tests.machine import Process
from tests.rewards.bombs import DEADLY, LASTING, PASSING
from tests.small import GOLD, SOLVE, AtOnce, build_small_image, request, small_task
from tests.support import needs

pytestmark = pytest.mark.ci  # the fast tier has five minutes for all rooms

sandboxes = needs("userns", "overlay", "git")

LIMITS = Limits(memory=512 << 20, disk=64 << 20, processes=128, inodes=4096, output=1 << 20)
OF_THE_TASK = {Outcome.RESOLVED, Outcome.UNRESOLVED, Outcome.EMPTY_PATCH, Outcome.PATCH_FAILED, Outcome.TESTS_TIMEOUT}


# -- the table itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("event", Event, ids=str)
def test_what_a_command_can_bring_about_is_scored_and_nothing_else_is(event: Event) -> None:
    rule = fault.TABLE[event]
    masked = rule.outcome is Outcome.INFRA_ERROR
    assert masked is not rule.inside
    if rule.outcome is None:
        with pytest.raises(ValueError, match="command's result"):
            outcome_of(event)
    else:
        assert (reward_of(outcome_of(event)) is None) is masked


def test_a_process_of_ours_that_dies_is_masked_once_and_then_scored() -> None:
    ours = [event for event, rule in fault.TABLE.items() if rule.again is not None]
    assert ours == [Event.WORKER_LOST, Event.LAUNCHER_LOST]
    for event in ours:
        assert outcome_of(event) is Outcome.INFRA_ERROR
        for before in ours:
            assert outcome_of(event, before) is Outcome.AGENT_ERROR
        for other in ("", "node_lost", "no such event"):
            assert outcome_of(event, other) is Outcome.INFRA_ERROR
            assert not needs_its_own_worker(other)


def test_no_other_fault_becomes_a_number_by_coming_again() -> None:
    for event, rule in fault.TABLE.items():
        if rule.outcome is Outcome.INFRA_ERROR and rule.again is None:
            assert {outcome_of(event, before) for before in Event} == {Outcome.INFRA_ERROR}


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (WorkerLost("x"), Event.WORKER_LOST),
        (OutOfMemory("x"), Event.OUT_OF_MEMORY),
        (MemoryError(), Event.OUT_OF_MEMORY),
        (NodeLost("x"), Event.NODE_LOST),
        (CorruptLayer("x"), Event.LAYER_CORRUPT),
        (StoreError("x"), Event.STORE_GONE),
        (DiskFull("x"), Event.DISK_FULL),
        (OSError(errno.ENOSPC, "x"), Event.DISK_FULL),
        (OSError(errno.EDQUOT, "x"), Event.DISK_FULL),
        (OSError(errno.EIO, "x"), Event.OURS),
        (TaskError("x"), Event.TASK_UNFIT),
        (PluginError("x"), Event.TASK_UNFIT),
        (MachineError("x"), Event.NOT_SET_UP),
        (SandboxError("x"), Event.NOT_SET_UP),
        (SandboxGone("x"), Event.NOT_SET_UP),
        (PolicyError("x"), Event.UNANSWERED),
        (NodeError("x"), Event.OURS),
        (BuildError("x"), Event.OURS),
        (KeyError("x"), Event.OURS),
    ],
    ids=repr,
)
def test_an_exception_names_its_row(error: BaseException, event: Event) -> None:
    assert event_of(error) is event


# -- rollouts ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Yard:
    """Rollouts of the small task over a store and a cache."""

    store: Store
    cache: Cache
    made: list[Rollout] = dataclasses.field(default_factory=list)

    def rollout(self, task: Task | None = None, **changes: Any) -> Rollout:
        options = {"command_timeout": 3.0, **changes.pop("options", {})}
        asked = request(task or small_task(timeout=5.0), limits=LIMITS, options=options, **changes)
        self.made.append(AtOnce(asked, store=self.store, cache=self.cache, node="here"))
        return self.made[-1]

    def play(self, rollout: Rollout, *texts: str) -> Finished:
        turn = rollout.open()
        for text in texts:
            if not turn.done:
                turn = rollout.step(text)
        assert turn.finished is not None
        return turn.finished

    def graded(self, patch: str, task: Task | None = None, **changes: Any) -> Finished:
        """A patch, as another rollout left it."""
        turn = self.rollout(task, **changes).grade(patch)
        assert turn.finished is not None
        return turn.finished


@pytest.fixture
def yard(store_directory: Path, cache_directory: Path) -> Iterator[Yard]:
    build_small_image(store_directory, cache_directory)
    found = Yard(Store(store_directory), Cache(cache_directory))
    yield found
    for rollout in found.made:
        rollout.abort()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk that a cache fits on."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "disk"
    path.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=16m"):
        raise OSError(ctypes.get_errno(), "mount", str(path))
    shutdown_launcher()  # one that is running has the mounts of when it started
    yield path
    shutdown_launcher()
    libc.umount2(os.fsencode(path), 2)  # MNT_DETACH


@pytest.fixture
def own_yard(store_directory: Path, cache_directory: Path, tmp_path: Path) -> Iterator[Yard]:
    """With a store and a cold cache of its own, to be damaged."""
    build_small_image(store_directory, cache_directory)
    shutil.copytree(store_directory, tmp_path / "store", symlinks=True)
    found = Yard(Store(tmp_path / "store"), Cache(tmp_path / "cache"))
    yield found
    for rollout in found.made:
        rollout.abort()


def masked(finished: Finished, event: Event, *words: str) -> None:
    """Ours: no number, and the error names what."""
    record = finished.record
    assert (record.outcome, record.reward, finished.event) == (Outcome.INFRA_ERROR, None, event.value), record
    for word in words:
        assert word in record.error
    assert not finished.repeat
    assert RolloutRecord.from_json(record.to_json()) == record


def scored(finished: Finished, outcomes: set[Outcome]) -> None:
    """The agent's: a number."""
    record = finished.record
    assert record.outcome in outcomes, record
    assert isinstance(record.reward, float)
    assert record.reward == (1.0 if record.outcome is Outcome.RESOLVED else 0.0)


# -- what a command inside can bring about: in the rollout, and as a patch whose tests do it --------


def patch_of(answer: str) -> str:
    """`answer.sh` becomes this; the tests run it."""
    lines = answer.splitlines()
    added = "".join(f"+{line}\n" for line in lines)
    return (
        "diff --git a/answer.sh b/answer.sh\n--- a/answer.sh\n+++ b/answer.sh\n"
        f"@@ -1 +1,{len(lines)} @@\n-echo wrong\n{added}"
    )


MODES = pytest.mark.parametrize("mode", ["protected", "official"])
QUICK = {"disk", "init killed", "init stopped", "the shell killed", "everything killed"}


def bombs(*kinds: dict[str, str]) -> list[Any]:
    return [
        pytest.param(bomb, id=name, marks=[] if name in QUICK else [pytest.mark.ci])
        for kind in kinds
        for name, bomb in kind.items()
    ]


@sandboxes
class TestTheAgents:
    @pytest.mark.parametrize("bomb", bombs(PASSING, DEADLY))
    def test_a_bomb_is_a_commands_result_and_the_rollout_goes_on(self, yard: Yard, bomb: str) -> None:
        finished = yard.play(yard.rollout(), bomb, SOLVE, "submit")
        scored(finished, {Outcome.RESOLVED})
        assert (finished.event, finished.repeat, finished.record.turns) == ("", False, 3)

    @pytest.mark.parametrize("bomb", bombs(LASTING))
    def test_a_bomb_that_lasts_is_scored(self, yard: Yard, bomb: str) -> None:
        scored(yard.play(yard.rollout(), bomb, SOLVE, "submit"), OF_THE_TASK | {Outcome.AGENT_ERROR})

    @pytest.mark.parametrize("bomb", bombs(PASSING))
    @MODES
    def test_a_bomb_in_the_tests_is_scored_by_what_they_say(self, yard: Yard, bomb: str, mode: str) -> None:
        grading = GradingConfig(mode=mode)
        finished = yard.graded(patch_of(f"({bomb}) >/dev/null 2>&1\necho right"), grading=grading)
        scored(finished, {Outcome.RESOLVED})
        assert not finished.repeat

    @pytest.mark.parametrize("bomb", bombs(DEADLY, LASTING))
    @MODES
    def test_a_bomb_that_ends_the_tests_is_scored(self, yard: Yard, bomb: str, mode: str) -> None:
        patch = patch_of(f"exec >/dev/null 2>&1\nbash -c '{escaped(bomb)}'\n{bomb}")
        finished = yard.graded(patch, small_task(timeout=2.0), grading=GradingConfig(mode=mode))
        scored(finished, {Outcome.UNRESOLVED, Outcome.TESTS_TIMEOUT})

    def test_a_sandbox_that_ended_on_a_healthy_node(self, yard: Yard) -> None:
        rollout = yard.rollout()
        rollout.open()
        os.kill(rollout._sandbox.pid, signal.SIGKILL)  # type: ignore[union-attr]
        finished = rollout.step("true").finished
        assert finished is not None
        scored(finished, {Outcome.AGENT_ERROR})
        assert finished.event == Event.SANDBOX_ENDED

    def test_a_sandbox_that_ended_after_the_time_was_up(self, yard: Yard) -> None:
        rollout = yard.rollout(bounds=RolloutConfig(step=1.0), options={"command_timeout": 60.0})
        rollout.open()
        killer = threading.Timer(0.4, os.kill, (rollout._sandbox.pid, signal.SIGKILL))  # type: ignore[union-attr]
        killer.start()
        finished = rollout.step("sleep 600").finished
        assert finished is not None
        scored(finished, {Outcome.AGENT_ERROR, Outcome.AGENT_LIMIT})

    def test_time(self, yard: Yard) -> None:
        rollout = yard.rollout(bounds=RolloutConfig(step=0.5), options={"command_timeout": 600.0})
        finished = yard.play(rollout, SOLVE, "sleep 600")
        scored(finished, {Outcome.RESOLVED})
        assert finished.record.ended_by == "time"

    def test_tests_that_take_too_long(self, yard: Yard) -> None:
        finished = yard.graded(patch_of("echo right\nsleep 600"), small_task(timeout=1.0))
        scored(finished, {Outcome.TESTS_TIMEOUT})

    def test_a_scaffold_that_fails_after_an_answer(self, yard: Yard) -> None:
        scored(yard.play(yard.rollout(options={"fail": 2}), SOLVE), {Outcome.RESOLVED})
        rollout = yard.rollout(options={"fail": 2})
        rollout.open()
        os.kill(rollout._sandbox.pid, signal.SIGKILL)  # type: ignore[union-attr]
        finished = rollout.step("true").finished
        assert finished is not None
        scored(finished, {Outcome.AGENT_ERROR})


def escaped(command: str) -> str:
    return command.replace("'", "'\\''")


# -- what can be either: graded once more, elsewhere ------------------------------------------------


MARK = "61.875"
SLEEPING = patch_of(f"sleep {MARK}")
"""Its tests are under way for as long as it takes to do something to them."""


def while_testing(act: Callable[[Process], object]) -> threading.Thread:
    """Do something as soon as the tests of `SLEEPING` run."""
    thread = threading.Thread(target=lambda: act(marked(MARK)), daemon=True)
    thread.start()
    return thread


@sandboxes
class TestEither:
    @MODES
    def test_a_sandbox_that_dies_under_the_tests_of_a_healthy_node_is_to_be_graded_again(
        self, yard: Yard, mode: str
    ) -> None:
        while_testing(lambda sleep: kill(init_above(sleep)))
        finished = yard.graded(SLEEPING, small_task(timeout=60.0), grading=GradingConfig(mode=mode))
        scored(finished, {outcome_of(Event.GRADING_DIED)})
        assert finished.repeat and finished.patch == SLEEPING
        assert "the sandbox died under the patch" in finished.record.error

    def test_a_launcher_that_dies_under_the_tests_is_ours_once_and_then_the_rows(self, yard: Yard) -> None:
        while_testing(lambda sleep: kill(launcher_above(sleep)))
        masked(yard.graded(SLEEPING, small_task(timeout=60.0)), Event.LAUNCHER_LOST)
        while_testing(lambda sleep: kill(launcher_above(sleep)))
        again = yard.graded(SLEEPING, small_task(timeout=60.0), before="launcher_lost")
        scored(again, {Outcome.AGENT_ERROR})
        assert again.event == Event.LAUNCHER_LOST

    def test_a_launcher_that_dies_under_the_agent_is_ours(self, yard: Yard) -> None:
        rollout = yard.rollout(options={"command_timeout": 60.0})
        rollout.open()
        kill(rollout._held.launcher.pid)  # type: ignore[union-attr]
        finished = rollout.step("sleep 600").finished  # its init may take a moment to notice
        assert finished is not None
        masked(finished, Event.LAUNCHER_LOST)

    @pytest.mark.ci
    def test_a_patch_that_makes_grading_slow_is_to_be_graded_again_and_has_no_other_sandbox(self, yard: Yard) -> None:
        one = "diff --git a/{0} b/{0}\nnew file mode 100644\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+x\n"
        many = "".join(one.format(f"many/{number}") for number in range(60_000))
        limits = dataclasses.replace(LIMITS, inodes=100_000, disk=256 << 20, memory=1 << 30)
        task, bounds = small_task(timeout=0.2), RolloutConfig(grade=0.6)
        asked = request(task, limits=limits, bounds=bounds, grading=GradingConfig(mode="official"))
        rollout = Rollout(asked, store=yard.store, cache=yard.cache, node="here")
        yard.made.append(rollout)
        started = time.monotonic()
        finished = rollout.grade(many).finished
        assert finished is not None
        scored(finished, {outcome_of(Event.GRADING_LATE)})
        assert finished.repeat and "took more than 0.8 s" in finished.record.error
        assert time.monotonic() - started < 20
        assert rollout._held._sandboxes == []

    def test_the_time_of_a_grading_has_room_for_every_retry(self) -> None:
        asked = request(small_task(timeout=100.0), grading=GradingConfig(retries=3), bounds=RolloutConfig(grade=7.0))
        assert asked.grading_seconds == 407.0
        official = dataclasses.replace(asked, grading=GradingConfig(mode="official", retries=3))
        assert official.grading_seconds == 107.0
        assert asked.ending_seconds > asked.grading_seconds + asked.bounds.grade


# -- what no command can: at each step of a rollout and of grading ----------------------------------


@sandboxes
class TestOurs:
    def test_a_store_without_the_image(self, yard: Yard, tmp_path: Path) -> None:
        yard.store = Store(tmp_path / "empty")
        words = ("small-1", "not in the store", "minisandbox image build")
        masked(yard.play(yard.rollout()), Event.STORE_GONE, *words)
        masked(yard.graded(patch_of("echo right")), Event.STORE_GONE, *words)

    def test_a_store_that_goes_away(self, own_yard: Yard) -> None:
        shutil.rmtree(own_yard.store.path)
        masked(own_yard.play(own_yard.rollout()), Event.STORE_GONE, "store")
        masked(own_yard.graded(patch_of("echo right")), Event.STORE_GONE, "store")

    def test_a_store_that_goes_away_under_a_rollout_is_not_missed(self, own_yard: Yard) -> None:
        rollout = own_yard.rollout()
        rollout.open()
        shutil.rmtree(own_yard.store.path)
        rollout.step(SOLVE)
        finished = rollout.step("submit").finished
        assert finished is not None
        scored(finished, {Outcome.RESOLVED})

    def test_a_blob_that_is_not_there(self, own_yard: Yard) -> None:
        for blob in blobs(own_yard):
            blob.unlink()
        masked(own_yard.graded(patch_of("echo right")), Event.STORE_GONE, "is not in the store")

    def test_a_layer_that_is_corrupt_at_its_source(self, own_yard: Yard) -> None:
        for blob in blobs(own_yard):
            data = bytearray(blob.read_bytes())
            data[len(data) // 2] ^= 0xFF
            blob.chmod(0o600)
            blob.write_bytes(bytes(data))
        masked(own_yard.graded(patch_of("echo right")), Event.LAYER_CORRUPT, "corrupt", str(own_yard.store.path))

    def test_a_cache_that_loses_a_layer_between_the_agent_and_the_grade(self, own_yard: Yard) -> None:
        rollout = own_yard.rollout()
        rollout.open()
        rollout.step(SOLVE)
        shutil.rmtree(own_yard.cache.path / "l")
        finished = rollout.step("submit").finished
        assert finished is not None
        masked(finished, Event.NOT_SET_UP)

    def test_an_image_whose_repository_is_damaged_on_this_node(self, own_yard: Yard) -> None:
        scored(own_yard.graded(patch_of("echo right")), {Outcome.RESOLVED})
        for head in (own_yard.cache.path / "l").rglob(".git/HEAD"):
            head.unlink()
        finished = own_yard.play(own_yard.rollout(), SOLVE, "submit")
        masked(finished, Event.STORE_GONE, "damaged")

    def test_a_sandbox_that_dies_before_any_of_the_patch_is_in(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rollout = yard.rollout()
        opened = rollout._held.open_sandbox

        def doomed(**options: Any) -> Any:
            sandbox = opened(**options)
            kill(sandbox.pid)
            return sandbox

        monkeypatch.setattr(rollout._held, "open_sandbox", doomed)
        finished = rollout.grade(patch_of("echo right")).finished
        assert finished is not None
        masked(finished, Event.NOT_SET_UP)

    def test_tests_that_do_not_fit_their_own_image(self, yard: Yard) -> None:
        task = small_task()
        broken = task.tests.model_copy(update={"patch": GOLD.replace("echo wrong", "echo other")})
        finished = yard.graded(patch_of("echo right"), task.model_copy(update={"tests": broken}))
        masked(finished, Event.TASK_UNFIT, "small-1", "does not fit its image")

    @pytest.mark.parametrize("command", ["/opt/env/bin/no-such-runner -v", "/srv/other.txt"])
    @MODES
    def test_a_runner_that_the_image_lacks(self, yard: Yard, command: str, mode: str) -> None:
        task = small_task()
        lacking = task.model_copy(update={"tests": task.tests.model_copy(update={"command": command})})
        finished = yard.graded(patch_of("echo right"), lacking, grading=GradingConfig(mode=mode))
        masked(finished, Event.STORE_GONE, "small-1", command.split()[0])

    @MODES
    def test_a_patch_that_makes_the_tests_look_as_if_the_runner_were_missing_is_scored(
        self, yard: Yard, mode: str
    ) -> None:
        task = small_task()
        command = "sh answer.sh >/dev/null || exit 127; bash check.sh"
        tests = task.tests.model_copy(update={"command": command})
        finished = yard.graded(
            patch_of("echo right\nexit 1"), task.model_copy(update={"tests": tests}), grading=GradingConfig(mode=mode)
        )
        scored(finished, {Outcome.UNRESOLVED})

    @needs("root")
    def test_a_disk_of_this_machine_that_is_full_at_the_checkout(self, yard: Yard, disk: Path) -> None:
        yard.cache = Cache(disk / "cache")
        fill(disk / "filler")
        words = ("no room left", str(yard.cache.path))
        masked(yard.play(yard.rollout()), Event.DISK_FULL, *words)
        masked(yard.graded(patch_of("echo right")), Event.DISK_FULL, *words)

    @needs("root")
    def test_a_disk_of_this_machine_that_fills_up_afterwards_costs_nothing(self, yard: Yard, disk: Path) -> None:
        yard.cache = Cache(disk / "cache")
        rollout = yard.rollout()
        rollout.open()
        rollout.step(SOLVE)
        fill(disk / "filler")
        finished = rollout.step("submit").finished
        assert finished is not None
        scored(finished, {Outcome.RESOLVED})

    def test_nobody_who_answers(self, yard: Yard) -> None:
        rollout = yard.rollout(bounds=RolloutConfig(idle=0.2))
        rollout.open()
        assert rollout._policy.wait_ended(30)
        finished = rollout.step("true").finished
        assert finished is not None
        masked(finished, Event.UNANSWERED, "no text came")

    def test_a_scaffold_that_fails_before_any_answer(self, yard: Yard) -> None:
        masked(yard.play(yard.rollout(options={"fail": 1})), Event.OURS, "a fault of the scaffold")

    def test_a_scaffold_that_cannot_be(self, yard: Yard) -> None:
        rollout = yard.rollout(options={"no_such_option": 1})
        masked(yard.play(rollout), Event.TASK_UNFIT, "no_such_option")

    def test_a_reward_with_a_fault(self, yard: Yard) -> None:
        reward = RewardConfig(f"{__name__}.broken_reward")
        masked(yard.graded(patch_of("echo right"), reward=reward), Event.OURS, "a fault of the reward")

    def test_a_grading_that_is_given_up(self, yard: Yard) -> None:
        rollout = yard.rollout(small_task(timeout=60.0))
        while_testing(lambda _: rollout.abort())
        finished = rollout.grade(SLEEPING).finished
        assert finished is not None
        masked(finished, Event.OURS, "given up")

    @pytest.mark.parametrize(
        ("kind", "event"), [(KeyError, Event.OURS), (MemoryError, Event.OUT_OF_MEMORY)], ids=["code", "memory"]
    )
    def test_a_fault_of_our_own_code_while_grading(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], event: Event
    ) -> None:
        def grade(*arguments: object, **options: object) -> None:
            raise kind("a fault of ours")

        monkeypatch.setattr("skyrl_minisandbox.rewards.grade", grade)
        masked(yard.graded(patch_of("echo right")), event, "a fault of ours")


def broken_reward(report: Any) -> float:
    raise KeyError("a fault of the reward")


def blobs(yard: Yard) -> list[Path]:
    """The store's layers: its large blobs; manifests and configurations are small."""
    found = [path for path in yard.store.path.rglob("*") if path.is_file() and "blobs" in path.parts]
    return [path for path in found if path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"]  # RFC 8878, zstd's magic number


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC
