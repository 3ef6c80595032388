"""One episode on a node: open, step, close, judge, abort.

The scaffold runs in a thread of its own and asks an `InvertedPolicy`; `step` answers it. How it ends:

    the scaffold submits                      ended_by=submit      graded
    it asks again after `max_turns` answers   ended_by=turn_limit  graded
    a step, or all steps, take too long       ended_by=time        graded
    the caller closes early (context is full) ended_by=length      graded when asked for
    the scaffold raises                       ended_by=error       graded if there is a patch

Where that is a grade, `step` and `close` only take the patch and end the sandbox (`Turn.ungraded`); `judge` then runs
the tests, when its caller thinks that the machine has room for it.

What a failure is worth is decided by the table of rewards/fault.py. A sandbox that is gone is probed once: if a
new one from the same image works, it ended by what was done in it; if not, the machine is at fault. A grading whose
sandbox ended, or that did not end, is the caller's to repeat once on another node (`Finished.repeat`, `Rollout.grade`).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from skyrl_minisandbox.alarms import ALARMS
from skyrl_minisandbox.belongings import Belongings, Late
from skyrl_minisandbox.errors import (
    MiniSandboxError,
    NodeError,
    PolicyError,
    SandboxError,
    SandboxGone,
    StoreError,
    one_line,
)
from skyrl_minisandbox.policies.inverted import InvertedPolicy
from skyrl_minisandbox.policies.policy import Message, PolicyStopped
from skyrl_minisandbox.record import EndedBy, Outcome, RolloutRecord, Seconds
from skyrl_minisandbox.rewards import fault
from skyrl_minisandbox.rewards.fault import Event
from skyrl_minisandbox.turn import CANCELLATION, Finished, RolloutRequest, Turn

if TYPE_CHECKING:
    from skyrl_minisandbox.images import Cache, Store
    from skyrl_minisandbox.images.pools import Pools
    from skyrl_minisandbox.rewards import TestReport
    from skyrl_minisandbox.sandbox import Sandbox
    from skyrl_minisandbox.scaffolds.scaffold import Submission

logger = logging.getLogger(__name__)

Finish = Callable[[], Turn]
"""Takes a scaffold's end down, which may take as long as `RolloutRequest.stopping_seconds`."""

LOG_KEPT = 256 << 10
"""Characters of a test log that travel to the driver: the tail, where test runners put their summary."""


@dataclasses.dataclass(frozen=True)
class Left:
    """What a scaffold left, to be graded. left_out: what of its work is not in the patch and why; mostly ""."""

    patch: str
    ended_by: EndedBy
    error: str = ""
    left_out: str = ""


class Rollout:
    """One episode. `open`, `step`, `close`, `judge` come one after the other; `abort` at any time, from any thread."""

    def __init__(
        self, request: RolloutRequest, *, store: Store, cache: Cache, node: str, pools: Pools | None = None
    ) -> None:
        self.request = request
        self.stuck = False  # its scaffold ignored the cancellation: the worker cannot be trusted any more
        self._cache, self._node = cache, node
        self._held = Belongings(request, store, cache, pools)
        self._serial = threading.Lock()  # one of open, step, close, judge at a time; `begin` has another thread free it
        self._policy = InvertedPolicy(patience=request.bounds.idle)
        self._ready = threading.Event()  # the sandbox is there, or will never be
        self._sandbox: Sandbox | None = None
        self._submission: Submission | None = None
        self._error: BaseException | None = None
        self._seconds = Seconds()
        self._conversation: list[Message] = []
        self._left: Left | None = None  # once it waits for `judge`
        self._turn: Turn | None = None  # the last one, once finished

    # -- verbs ------------------------------------------------------------------------------------

    def open(self) -> Turn:
        """Check the image out, make the sandbox, run the scaffold up to its first question.

        Never raises for a fault of the rollout: that is a finished Turn with `infra_error`.
        """
        with self._serial:
            threading.Thread(target=self._work, name=self.request.rollout_id, daemon=True).start()
            bounds = self.request.bounds
            if not self._ready.wait(bounds.setup):
                return self._fail(NodeError(f"checkout and sandbox took more than {bounds.setup:g} s"))
            if self._sandbox is None:
                return self._fail(self._error or NodeError("the rollout was given up while it was set up"))
            started = time.monotonic()
            try:
                messages = self._policy.first(bounds.step)
            except TimeoutError:
                return self._fail(NodeError(f"the scaffold asked nothing for {bounds.step:g} s"))
            self._seconds.agent += time.monotonic() - started
            if messages is None and self._error is not None:
                return self._fail(self._error)  # no answer was given yet, so no answer can be the cause
            self._conversation += messages or []
            return Turn(messages or [])

    def step(self, text: str) -> Turn:
        """Hand `text` to the scaffold; return what it asks next, or its end, which mostly is still to be graded.

        A scaffold that has ended without asking ends now, whatever the text.
        """
        with self._serial:
            if self._over is not None:
                return self._over
            started = time.monotonic()
            try:
                messages = self._policy.answer(text, self._time_left)
            except TimeoutError:
                rest = self._went_on(text, started, None, late=True)
            else:
                rest = self._went_on(text, started, messages)
            return rest if isinstance(rest, Turn) else rest()

    def begin(self, text: str, reply: Callable[[Turn | Finish], None]) -> bool:
        """`step` without waiting. False, and nothing happens, where it cannot be begun so: `step` does it.

        reply: called once, with the Turn, or with the function to call for it where that takes its time. It is called
            by the scaffold's thread, or `abort`'s, or an alarm's, none of which may wait in it.
        """
        if not self._serial.acquire(blocking=False):
            return False
        started, seconds = time.monotonic(), self._time_left

        def settle(rest: Turn | Finish) -> None:
            if isinstance(rest, Turn):
                self._serial.release()
                reply(rest)
                return

            def finish() -> Turn:
                try:
                    return rest()
                finally:
                    self._serial.release()

            reply(finish)

        def asked(messages: list[Message] | None) -> None:
            ALARMS.cancel(asked)
            settle(self._went_on(text, started, messages))

        def late() -> None:
            if self._policy.take_back(asked):
                settle(self._went_on(text, started, None, late=True))

        if self._over is not None or seconds <= 0 or not self._policy.give(text, asked):
            self._serial.release()
            return False
        ALARMS.set(asked, seconds, late)
        if not self._policy.awaits(asked):  # it was quicker
            ALARMS.cancel(asked)
        return True

    @property
    def _time_left(self) -> float:
        bounds = self.request.bounds
        return min(bounds.step, bounds.time - self._seconds.agent)

    def _went_on(
        self, text: str, started: float, messages: list[Message] | None, *, late: bool = False
    ) -> Turn | Finish:
        """Take down a text and what came of it (None: the scaffold ended); the Turn, or how it is to be ended now."""
        self._seconds.agent += time.monotonic() - started
        if self._policy.turns:
            self._conversation.append({"role": "assistant", "content": text})
        if late:
            return lambda: self._finish(EndedBy.TIME)
        if messages is None:
            return lambda: self._finish(None)
        self._conversation += messages
        if self.request.max_turns and self._policy.turns >= self.request.max_turns:
            return lambda: self._finish(EndedBy.TURN_LIMIT)
        if self._seconds.agent >= self.request.bounds.time:
            return lambda: self._finish(EndedBy.TIME)
        return Turn(messages)

    def grade(self, patch: str) -> Turn:
        """Only grade `patch`, which another rollout left. Instead of `open`; never raises, as there."""
        with self._serial:
            try:
                self._set_up()
                return self._graded(Left(patch, EndedBy.SUBMIT))
            except Exception as failure:
                return self._fail(failure)
            finally:
                self._ready.set()
                self._policy.end()
                self._held.give_back()

    def close(self, *, grade: bool, ended_by: EndedBy = EndedBy.LENGTH) -> Turn | None:
        """End it now: to be graded, or given up (None). Idempotent; one that has ended gives its end again."""
        if not grade:
            self.abort()
        with self._serial:
            if self._over is None and grade and not self._held.aborted:
                return self._finish(None if self._policy.wait_ended(0) else ended_by)
            return self._over if grade else self._turn

    def judge(self) -> Turn:
        """Grade what the scaffold left. Never raises but for a rollout that has not ended (`NodeError`)."""
        with self._serial:
            if self._turn is not None:
                return self._turn
            if self._left is None:
                raise NodeError(f"rollout {self.request.rollout_id} has not ended, so there is nothing to grade")
            try:
                return self._graded(self._left)
            except Exception as failure:
                return self._fail(failure)
            finally:
                self._held.give_back()

    @property
    def _over(self) -> Turn | None:
        """The end, graded or not; None while it runs."""
        return self._turn or (Turn([], ungraded=True) if self._left is not None else None)

    def abort(self) -> None:
        """Kill everything of it at once; whatever waits for it returns. Idempotent."""
        self._held.abort()
        self._policy.stop(EndedBy.ERROR)
        self._held.close_sandboxes()
        if self._ready.is_set() and not self._policy.wait_ended(CANCELLATION):
            self.stuck = True
        self._held.release()

    # -- the scaffold's thread --------------------------------------------------------------------

    def _work(self) -> None:
        from skyrl_minisandbox.scaffolds import load_scaffold
        from skyrl_minisandbox.scaffolds.scaffold import check_invertible

        request = self.request
        try:
            scaffold = load_scaffold(request.scaffold.name, **request.scaffold.options)
            check_invertible(scaffold, request.scaffold.name)
            self._set_up()
            started = time.monotonic()
            sandbox = self._held.open_sandbox()
            self._seconds.create = time.monotonic() - started
            self._sandbox = sandbox
            self._ready.set()
            task = request.task if scaffold.privileged else request.task.public()
            self._submission = scaffold.run(task, sandbox, self._policy)
        except PolicyStopped:
            pass
        except BaseException as error:
            if not self._held.aborted:
                logger.warning("rollout %s: %r", request.rollout_id, error, exc_info=True)
            self._error = error
        finally:
            self._ready.set()
            self._policy.end()
            # Given up while it was set up, or nobody answered for `idle`: nobody else will clean up.
            if self._held.aborted or isinstance(self._error, PolicyError):
                self._held.give_back()

    def _set_up(self) -> None:
        started = time.monotonic()
        self._held.set_up()
        self._seconds.checkout = time.monotonic() - started

    # -- the end ----------------------------------------------------------------------------------

    def _finish(self, ended_by: EndedBy | None) -> Turn:
        """Take the patch, end the sandbox. `ended_by` None: the scaffold's own ending."""
        try:
            self._stop_scaffold(ended_by)
            submission = self._submission
            error = submission.error if submission is not None else ""
            if submission is None and self._error is not None:
                if isinstance(self._error, MiniSandboxError) and not isinstance(self._error, SandboxGone):
                    raise self._error
                ended_by, error = ended_by or EndedBy.ERROR, one_line(self._error)
            ended_by = ended_by or (submission.ended_by if submission is not None else EndedBy.ERROR)
            try:
                patch, left_out = self._take_patch(submission)
            except SandboxGone as gone:
                if not self._held.node_is_healthy():
                    raise
                return self._ungraded(Event.SANDBOX_ENDED, ended_by, error or one_line(gone))
            self._left = Left(patch, ended_by, error, left_out)
            return Turn([], ungraded=True)
        except Exception as failure:
            return self._fail(failure)
        finally:
            self._held.close_sandboxes()  # the agent's goes before grading starts
            if self._left is None:
                self._held.release()

    def _take_patch(self, submission: Submission | None) -> tuple[str, str]:
        """The patch, and what of the agent's work is not in it and why; mostly ""."""
        if submission is not None and submission.patch is not None:
            return submission.patch, ""
        from skyrl_minisandbox.rewards.patch import take_patch

        sandbox, workdir = self._sandbox, self.request.task.recipe.workdir
        assert sandbox is not None
        with self._held.in_time("taking the patch", self.request.bounds.grade):
            taken = take_patch(sandbox, self._held.open_sandbox, workdir)
            return taken.patch, taken.left_out

    def _graded(self, left: Left) -> Turn:
        from skyrl_minisandbox.rewards import load_reward

        request = self.request
        reward = load_reward(request.reward.name, **request.reward.options)
        report = self._verdict(left.patch, reward.needs)
        if report.sandbox_died and not self._held.node_is_healthy():
            raise SandboxGone(report.error)
        told = f"not in the patch: {left.left_out}" if left.left_out else ""
        return self._end(
            report.outcome,
            left.ended_by,
            reward(report),
            left.error or "; ".join(filter(None, (report.error, told))),
            patch=left.patch,
            report=report,
            repeat=report.sandbox_died,
        )

    def _verdict(self, patch: str, needs: frozenset[str]) -> TestReport:
        """The grade; where `reward.memo` allows it, one that this node gave the same patch before."""
        request, checkout = self.request, self._held.checkout
        if not request.reward.memo or checkout is None:
            return self._grade(patch, needs)
        from skyrl_minisandbox.rewards.memo import memo_at, memo_key

        memo = memo_at(self._cache.path / "memo")
        key = memo_key(
            request.task, checkout.image.digest, patch, grading=request.grading, limits=request.limits, needs=needs
        )  # fmt: skip
        report = memo.get(key)
        if report is None:
            report = self._grade(patch, needs)
            memo.put(key, report)
        return report

    def _grade(self, patch: str, needs: frozenset[str]) -> TestReport:
        """Grade within its time. Too late is as good as dead: each step has a limit of its own, so that only a patch
        that makes every one of them slow comes here, or a machine in trouble."""
        from skyrl_minisandbox.rewards import TestReport, grade

        request = self.request
        started = time.monotonic()
        try:
            with self._held.in_time(f"grading task {request.task.id}", request.grading_seconds):
                return grade(request.task, patch, self._held.open_sandbox, grading=request.grading, needs=needs)
        except Late as late:
            outcome, mode = fault.outcome_of(Event.GRADING_LATE), request.grading.mode
            return TestReport(outcome, error=late.message, sandbox_died=True, grading=mode)
        finally:
            self._seconds.grade += time.monotonic() - started

    def _ungraded(self, event: Event, ended_by: EndedBy, error: str) -> Turn:
        if ended_by in (EndedBy.TIME, EndedBy.TURN_LIMIT, EndedBy.LENGTH):
            event = Event.TIME_LIMIT
        outcome = fault.outcome_of(event)
        return self._end(outcome, ended_by, fault.reward_of(outcome), error, event=event)

    def _fail(self, error: BaseException) -> Turn:
        """Nothing could be graded, for a reason of ours unless the same row brings it about again."""
        if self._held.aborted and isinstance(error, SandboxError):
            error = NodeError("the rollout was given up")
        event = fault.event_of(error)
        if isinstance(error, SandboxError) and self._held.launcher is not None and self._held.launcher.has_ended():
            event = Event.LAUNCHER_LOST  # what an exception says is less than what can be seen beside it
        outcome = fault.outcome_of(event, self.request.before)
        turn = self._end(outcome, EndedBy.ERROR, fault.reward_of(outcome), one_line(error), event=event)
        self.abort()
        if isinstance(error, StoreError):
            # A tree of the cache may be damaged below what a checkout looks at: the next one makes it anew.
            for layer in self._cache.verify():
                logger.error("rollout %s: layer %s of the cache was damaged", self.request.rollout_id, layer)
        return turn

    def _end(
        self,
        outcome: Outcome,
        ended_by: EndedBy,
        reward: float | None,
        error: str,
        *,
        patch: str = "",
        report: TestReport | None = None,
        event: Event | None = None,
        repeat: bool = False,
    ) -> Turn:
        request = self.request
        record = RolloutRecord(
            rollout_id=request.rollout_id,
            task_id=request.task.id,
            outcome=outcome,
            ended_by=ended_by,
            reward=None if reward is None else float(reward),
            turns=self._policy.turns,
            seconds=dataclasses.replace(self._seconds),
            node=self._node,
            error=error,
        )
        logger.info("rollout %s: %s, ended by %s %s", record.rollout_id, outcome, ended_by, error)
        trajectory = {
            "rollout_id": request.rollout_id,
            "task_id": request.task.id,
            "scaffold": request.scaffold.name,
            "messages": list(self._conversation),
            "scaffold_trajectory": self._submission.trajectory if self._submission is not None else None,
        }
        whole = dataclasses.replace(report, log=report.log[-LOG_KEPT:]).to_json() if report is not None else None
        self._turn = Turn(
            [],
            Finished(
                record,
                patch=patch,
                tests=whole["tests"] if whole else {},  # the same objects: they are pickled once
                log=whole["log"] if whole else "",
                report=whole,
                trajectory=trajectory,
                history_divergence=self._policy.history_divergence,
                event=str(event or ""),
                repeat=repeat,
            ),
        )
        return self._turn

    def _stop_scaffold(self, ended_by: EndedBy | None) -> None:
        """Have its thread end by itself (a command under way is killed), or it costs the worker."""
        self._policy.stop(ended_by or EndedBy.SUBMIT)
        if ended_by is EndedBy.TIME and self._sandbox is not None:
            self._sandbox.interrupt()
        if not self._policy.wait_ended(CANCELLATION):
            logger.error("rollout %s: its scaffold ignores its end", self.request.rollout_id)
            self.stuck = True
