"""SkyRL's generator with what rollouts in real sandboxes need: admission, deadlines, retries, no row lost or faked.

SkyRL is as it is: a few of its methods are overridden, and every token, log-prob and loss mask is its own, since its
`agent_loop` runs each try. Around that, for rows of our Env:

    admission    `training.running` rows at once, in order of arrival, each for all its tries; of these
                 `training.starting` are set up at the same time. Neither waits in a thread.
    its end      `training.time` after set-up the next `step` ends it, graded. An engine that does not come back long
                 after that is given up. A full context is graded when SkyRL closes the Env, and has that reward.
    a failure    of ours (rewards/fault.py), or whatever raised: the Env is closed, and the row comes again elsewhere.
                 After its retries a masked row of one token takes its place.
    the batch    is settled when all rows are there (rows.py), unless too many failed (breaker.py).

Nothing raises but `InfraErrorsError`, `MachineError` where no node starts at all, and what rows of other Envs raise; in
every case, and when SkyRL cancels it (the end of a fully asynchronous epoch), the Envs are closed first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator, StepWiseOutput, TrajectoryOutput

from skyrl_minisandbox import placement as _placement
from skyrl_minisandbox.config import EnvConfig, make_config
from skyrl_minisandbox.env import ENV_ID, MiniSandboxEnv, register, shared_cluster
from skyrl_minisandbox.errors import InputError, MiniSandboxError, NodeError, PolicyError, one_line
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.fault import event_of
from skyrl_minisandbox.training import rows as _rows
from skyrl_minisandbox.training.attempt import Attempt, in_thread
from skyrl_minisandbox.training.breaker import Breaker
from skyrl_minisandbox.training.rows import INFRA_ERROR, PROMPT_TOO_LONG, Row

logger = logging.getLogger(__name__)

T = TypeVar("T")

LET_GO = 10.0
"""Seconds that SkyRL's loop has to end once it is cancelled; it tells the engine, which may hang."""

CLOSING = 30.0
"""Seconds that the close of a failed Env is waited for; its thread goes on."""

PAUSE = 0.5
"""Seconds before the first retry; twice as long before each further one."""

_SEAT = "minisandbox_seat"
"""Key under which `generate` hands a row to `agent_loop`."""


@dataclasses.dataclass
class Call:
    """One `generate`. tasks: those that run its rows."""

    rows: list[Row]
    tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)
    over: bool = False

    async def end(self) -> None:
        """Cancel what still runs, and wait until it has closed its Env."""
        self.over = True
        tasks = {task for task in self.tasks if task is not asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LET_GO + CLOSING)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # was told by the first that failed


@dataclasses.dataclass
class Gates:
    """What a row passes; of one event loop. gradings: how many may come before a rollout's own has its turn."""

    loop: asyncio.AbstractEventLoop
    running: asyncio.Semaphore
    starting: asyncio.Semaphore
    gradings: int


class _PromptTooLong(Exception):
    """The scaffold's first messages have more tokens than `max_input_length`."""


class _Failed(Exception):
    """The Env has ended as `infra_error`; its record says why."""


class MiniSandboxGenerator(SkyRLGymGenerator):  # type: ignore[misc]  # skyrl has no type information
    """For SkyRL from 0.3.0; the constructor is SkyRL's. Used from one event loop at a time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register()  # SkyRL makes the Envs in this process
        super().__init__(*args, **kwargs)
        self._gates: Gates | None = None
        self._calls = 0

    @functools.cached_property
    def config(self) -> EnvConfig:
        """`environment.skyrl_gym.minisandbox`. Raises `InputError`."""
        return make_config(getattr(self.skyrl_gym_cfg, ENV_ID, None))

    @functools.cached_property
    def _breaker(self) -> Breaker:
        return Breaker(self.config.training.max_infra_error_fraction)

    # -- a call -----------------------------------------------------------------------------------

    async def generate(self, input_batch: Any, disable_tqdm: bool = False) -> Any:
        """SkyRL's output, a row for each of the batch's in its place.

        Raises `InfraErrorsError`, `MachineError`, `InputError` for `generator.batched=true`.
        """
        ours = [env_class == ENV_ID for env_class in input_batch["env_classes"]]
        if not any(ours):
            return await super().generate(input_batch, disable_tqdm)
        if self.batched:
            raise InputError("`generator.batched=true` is for a single turn", hint="generator.batched=false")
        names = input_batch.get("trajectory_ids")
        groups = [f"row {number}" if names is None else names[number].instance_id for number in range(len(ours))]
        call = Call([Row(group, ours=mine) for group, mine in zip(groups, ours, strict=True)])
        extras = input_batch["env_extras"] or [{} for _ in ours]
        seats = [
            {**given, _SEAT: (call, row)} if row.ours else given for given, row in zip(extras, call.rows, strict=True)
        ]
        self._calls += 1
        try:
            await self._admission()
            out = await super().generate({**input_batch, "env_extras": seats}, disable_tqdm)
            self._breaker.judge([row for row in call.rows if row.ours], alone=self._calls == 1)
        except BaseException:
            await call.end()
            raise
        finally:
            self._calls -= 1
        phase = getattr(input_batch.get("batch_metadata"), "training_phase", "train")
        return self._settled(out, call.rows, names, evaluating=phase == "eval")

    def _settled(self, out: Any, rows: list[Row], names: Any, *, evaluating: bool) -> Any:
        where = _rows.spans(out, names, len(rows))
        _rows.fill_side_channels(out)
        policy = self.config.training.failed_group_policy
        dropped = _rows.settle(out, rows, where, policy=policy, evaluating=evaluating)
        figures = _rows.metrics(rows, out, where, dropped)
        out["rollout_metrics"] = {**(out.get("rollout_metrics") or {}), **figures}
        logger.info(
            "%d rollouts: %d masked, %d retries, groups dropped: %s; reward of the others %.3f",
            len(rows),
            sum(row.masked for row in rows),
            sum(row.retries for row in rows),
            ", ".join(f"{cause} {number}" for cause, number in dropped.items()),
            figures.get("minisandbox/reward_unmasked_mean", float("nan")),
        )
        return out

    async def _admission(self) -> Gates:
        """The gates of this event loop. Where slots have to be counted that is done once: nodes that come later add
        none. Raises `MachineError` when no node starts."""
        loop = asyncio.get_running_loop()
        if self._gates is not None and self._gates.loop is loop:
            return self._gates
        training = self.config.training
        running = training.running or max(1, await in_thread("slots", lambda: shared_cluster(self.config).slots))
        if self._gates is None or self._gates.loop is not loop:  # another row may have been faster
            half = max(1, running // 2)
            starting, grading = training.starting or half, training.grading or half
            self._gates = Gates(
                loop, asyncio.Semaphore(running), asyncio.Semaphore(starting), gradings=-(-running // grading)
            )
        return self._gates

    # -- a row ------------------------------------------------------------------------------------

    async def agent_loop(self, prompt: Any, env_class: str, env_extras: dict[str, Any], *args: Any, **more: Any) -> Any:
        """SkyRL's, tried again where that may help; else a masked output of one token. See the module."""
        if env_class != ENV_ID:
            return await super().agent_loop(prompt, env_class, env_extras, *args, **more)
        extras = dict(env_extras)
        call, row = extras.pop(_SEAT, None) or (Call([]), Row("alone"))
        if call.over:
            raise asyncio.CancelledError
        if (task := asyncio.current_task()) is not None:
            call.tasks.add(task)
        loop = functools.partial(super().agent_loop, prompt, env_class)
        given = inspect.signature(super().agent_loop).bind(prompt, env_class, extras, *args, **more).arguments
        waiting = time.monotonic()
        gates = await self._admission()
        async with gates.running:
            row.waited += time.monotonic() - waiting
            output = await self._tries(row, lambda extras: loop(extras, *args, **more), extras, given)
        if call.rows:
            self._breaker.add(row, len(call.rows))
        return output

    async def _tries(self, row: Row, loop: Callable[[Any], Any], extras: dict[str, Any], given: Any) -> Any:
        training = self.config.training
        started = time.monotonic()
        pause = PAUSE
        while True:
            attempt = Attempt(row, training.time)
            output = await self._try(attempt, loop, extras, given)
            if output is None and row.cause == INFRA_ERROR:
                late = training.time and time.monotonic() - started >= training.time
                if row.retries < training.retries and not late:
                    logger.warning("a rollout of group %s is tried again: %s", row.group, row.error)
                    row.retries += 1
                    row.cause = ""
                    extras = {**extras, "node": row.node, "before": row.event}
                    await asyncio.sleep(pause)
                    pause *= 2
                    continue
            if output is None:
                logger.warning("a rollout of group %s is masked: %s: %s", row.group, row.cause, row.error)
                output = self._stub(row, given, time.monotonic() - started)
            return output

    async def _try(self, attempt: Attempt, loop: Callable[[Any], Any], extras: dict[str, Any], given: Any) -> Any:
        """SkyRL's output; None where there is nothing to train on, and the row says why."""
        row = attempt.row
        row.outcome = row.ended_by = None
        task = asyncio.ensure_future(loop({**extras, "episode": attempt}))
        error: Exception | None = None
        try:
            output = await self._watched(attempt, task)
            _check(output, logprobs=self._logprobs_asked(given))
        except asyncio.CancelledError:
            await _let_go(task)
            await self._close(attempt)
            raise
        except _PromptTooLong as long:
            row.cause, row.error = PROMPT_TOO_LONG, str(long)
            return None
        except Exception as raised:
            error = raised
            await self._close(attempt)
        finally:
            attempt.stop()
        finished = attempt.env.finished if attempt.env is not None else None
        if finished is not None:
            row.outcome, row.ended_by = finished.record.outcome, finished.record.ended_by
            row.node, row.event, row.error = finished.record.node, finished.event, finished.record.error
        if error is None and finished is not None and finished.record.outcome is not Outcome.INFRA_ERROR:
            return output
        if error is None and finished is None:
            error = MiniSandboxError("the episode ended without a record")
        if error is not None and not isinstance(error, _Failed):
            if not isinstance(error, MiniSandboxError):
                logger.error("a rollout of group %s: %r", row.group, error, exc_info=error)
            row.event, row.error = str(event_of(error)), one_line(error)
        row.cause, row.outcome = INFRA_ERROR, Outcome.INFRA_ERROR
        return None

    async def _watched(self, attempt: Attempt, task: asyncio.Future[Any]) -> Any:
        await asyncio.wait({task, attempt.overdue}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await _let_go(task)
            raise PolicyError(f"the engine did not answer for {attempt.patience:g} s after `training.time`")
        if task.cancelled():
            raise PolicyError("the rollout was cancelled from inside")
        return task.result()

    async def _close(self, attempt: Attempt) -> None:
        """Give its Env up; the wait is bounded, the close itself goes on."""
        attempt.grade_on_close = False
        if attempt.env is None:
            return
        closing = in_thread("close", attempt.env.close)
        await asyncio.wait({closing}, timeout=CLOSING)
        if not closing.done():
            logger.error("rollout %s does not close", attempt.env.rollout_id)
        elif (error := closing.exception()) is not None:
            logger.error("rollout %s: its close failed: %r", attempt.env.rollout_id, error)

    def _stub(self, row: Row, given: Any, seconds: float) -> Any:
        """One masked token of the shape that the other rows have. `given`: the arguments of `agent_loop`."""
        end = self.tokenizer.eos_token_id
        stub = TrajectoryOutput(
            response_ids=[end],
            reward=0.0 if self.custom_chat_template else [0.0],
            stop_reason="length" if row.cause == PROMPT_TOO_LONG else row.cause,
            loss_mask=[0],
            prompt_ids=[end],
            rollout_logprobs=[0.0] if self._logprobs_asked(given) else None,
            env_metrics={"infra_error_mean": float(row.cause == INFRA_ERROR)},
        )
        output = StepWiseOutput(step_outputs=[stub]) if self.generator_cfg.step_wise_trajectories else stub
        output.e2e_time = seconds
        output.time_splits = {"llm": 0.0, "env": 0.0}  # from 0.4.0
        return output

    def _logprobs_asked(self, given: Any) -> bool:
        """Whether SkyRL wants log-probabilities of each row. With a template of the user's own it has none."""
        sampling = given.get("sampling_params")
        asked = self.generator_cfg.sampling_params.logprobs if sampling is None else sampling.get("logprobs")
        return asked is not None and not self.custom_chat_template

    # -- SkyRL's hooks ----------------------------------------------------------------------------

    async def _run_in_executor_if_available(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Each call of our Env in a thread of its own: no pool to be exhausted by what hangs or waits."""
        env = getattr(func, "__self__", None)
        attempt = env.episode if isinstance(env, MiniSandboxEnv) else None
        if not isinstance(env, MiniSandboxEnv) or not isinstance(attempt, Attempt) or self._gates is None:
            result: T = await super()._run_in_executor_if_available(func, *args, **kwargs)
            return result
        name = getattr(func, "__name__", "")
        with attempt.in_env():
            if name == "init":
                return await self._set_up(attempt, env, lambda: func(*args, **kwargs))
            if name == "step":
                attempt.answers += 1
            elif name == "close":
                attempt.cut = env.finished is None
                attempt.grade_on_close = attempt.answers > 0
            result = await self._bounded(env, name, lambda: func(*args, **kwargs))
        if name == "close" and not attempt.answers:
            # SkyRL asked the engine nothing: what the scaffold begins with is more than `max_input_length`.
            raise _PromptTooLong("the scaffold's first messages are longer than `generator.max_input_length`")
        return result

    async def _set_up(self, attempt: Attempt, env: MiniSandboxEnv, init: Callable[[], T]) -> T:
        assert self._gates is not None
        waiting = time.monotonic()
        async with self._gates.starting:
            attempt.row.waited += time.monotonic() - waiting
            result = await self._bounded(env, "init", init)
        if env.finished is not None and env.finished.record.outcome is Outcome.INFRA_ERROR:
            raise _Failed  # before the engine is asked for an answer to nothing
        attempt.start(self.config.rollout.step + _placement.MARGIN)
        return result

    async def _bounded(self, env: MiniSandboxEnv, name: str, call: Callable[[], T]) -> T:
        """Every wait inside has its deadline; this is for a fault of the Env itself. Raises `NodeError`."""
        assert self._gates is not None
        seconds = env.longest(name, gradings=self._gates.gradings)
        future = in_thread(name, call)
        await asyncio.wait({future}, timeout=seconds)
        if not future.done():
            raise NodeError(f"the Env's {name} did not return within {seconds:g} s")
        return future.result()

    def _post_process_agent_loop_output(self, agent_loop_output: Any, env_extras: Any, trajectory_id: Any) -> Any:
        """The reward of a rollout that SkyRL cut short, which no `step` could give."""
        output = super()._post_process_agent_loop_output(agent_loop_output, env_extras, trajectory_id)
        attempt = env_extras.get("episode")
        if not isinstance(attempt, Attempt) or not attempt.cut or attempt.env is None or attempt.env.finished is None:
            return output
        last = output
        if isinstance(output, StepWiseOutput):
            last = output.step_outputs[-1]
            _rows.cut_observation(last)
        reward = attempt.env.finished.record.reward
        if reward is not None:
            last.reward = _rows.with_reward(last.reward, reward)
        last.env_metrics = attempt.env.get_metrics()
        return output


def _check(output: Any, *, logprobs: bool) -> None:
    """Raises `PolicyError` for what would fail the batch. Of our Env only texts and numbers come in; the rest is the
    engine's."""
    entries = output.step_outputs if isinstance(output, StepWiseOutput) else [output]
    if not entries:
        raise PolicyError("SkyRL made nothing of this rollout")
    for entry in entries:
        wrong = _rows.problem(entry)
        if not wrong and logprobs and entry.rollout_logprobs is None:
            wrong = "no log-probabilities"
        if wrong:
            raise PolicyError(f"what came back cannot be trained on: {wrong}")


async def _let_go(task: asyncio.Future[Any]) -> None:
    task.cancel()
    _, left = await asyncio.wait({task}, timeout=LET_GO)
    if left:
        logger.error("SkyRL's loop of a rollout does not end")
    elif not task.cancelled():
        task.exception()
