"""The rows: each method takes its samples and adds what it found to the report."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from benches.contender import Absent, Ground
from benches.report import Bar, Report, Row
from benches.training.peers import EARLIER, PREPARATION, SWE_REX, Bare, BareShells, swe_rex
from benches.training.rollouts import Episode, config_of
from skyrl_minisandbox.config import EnvConfig, make_config
from skyrl_minisandbox.env import shared_cluster
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.tasks.task import Task

REPOSITORY = Path(__file__).resolve().parents[4]
PAUSE = 1.0
"""Seconds between turns: what a model takes."""
STEP_BAR, CEILING_BAR, REQUEST_BAR, TAX_BAR = 5.0, 0.8, 2.0, 100.0
"""From the issue that asked for this: milliseconds, a ratio, seconds, worker-hours."""
ROLLOUTS, ACTIONS = 1_000_000, 150
"""The run whose tax is told."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of each. rounds: ours and the peer alternate so often."""

    live: int = 64
    rounds: int = 3
    turns: int = 8
    closed_seconds: float = 4.0
    rows: int = 128
    times: int = 5
    alone: int = 12
    actions: int = 100


QUICK = Size(live=8, rounds=1, turns=2, closed_seconds=0.5, rows=16, times=1, alone=2, actions=10)


class Measures:
    """`rows` are called in this order; each raises `Absent` with the reason when it cannot run here."""

    def __init__(self, work: Path, tasks: list[Task], report: Report, size: Size, docker: Ground | None) -> None:
        self.work, self.tasks, self.report, self.size, self._docker = work, tasks, report, size, docker
        self.config = make_config(config_of(work, scaffold="benches.training.rollouts.Shell"))
        self.still = make_config(config_of(work, scaffold="benches.training.rollouts.Still"))

    def rows(self) -> dict[str, Callable[[], None]]:
        return {"step": self.step, "ceiling": self.ceiling, "request": self.request, "tax": self.tax}

    # -- env.step beside the command in it --------------------------------------------------------

    def step(self) -> None:
        """Live rollouts that each think between their turns; the same many callers of an actor that does nothing."""
        size = self.size
        extra: list[float] = []
        inside: list[float] = []
        calls: list[float] = []
        with self._episodes(self.config, size.live) as episodes, self._bare() as actor:

            def ours(number: int) -> None:
                seconds, command = episodes[number].step("true")
                extra.append(seconds - command)
                inside.append(command)

            def bare(number: int) -> None:
                started = time.perf_counter()
                ray.get(actor.nothing.remote())
                calls.append(time.perf_counter() - started)

            for each in (ours, bare):
                each(0)  # what is done once
            for found in (extra, inside, calls):
                found.clear()
            for _ in range(size.rounds):
                for each in (ours, bare):
                    thinking(size.live, size.turns, each)
        self._add(
            f"`env.step` above the command in it, {size.live} rollouts, {PAUSE:g} s between turns",
            "ms",
            1e3 * statistics.median(extra),
            {"bare Ray actor": 1e3 * statistics.median(calls)},
            (Bar(STEP_BAR),),
        )
        self._add("  the same, p95", "ms", 1e3 * p95(extra), {"bare Ray actor": 1e3 * p95(calls)})
        self._add("  the command (`true` in the shell), in the node", "ms", 1e3 * statistics.median(inside))

    # -- as fast as it goes -----------------------------------------------------------------------

    def ceiling(self) -> None:
        """As many callers, none of whom thinks: steps a second, with nothing done in them and with a command."""
        size = self.size
        for words, config, shells in (("nothing done", self.still, False), ("`true` in the shell", self.config, True)):
            ours: list[float] = []
            peer: list[float] = []
            with self._bare(shells) as actor:
                if shells:
                    ray.get(actor.open.remote(size.live))

                def call(number: int, actor: Any = actor, shells: bool = shells) -> None:
                    ray.get(actor.run.remote(number, "true") if shells else actor.nothing.remote())

                for _ in range(size.rounds):
                    # New ones each time: a rollout whose history grows without end is nobody's.
                    with self._episodes(config, size.live) as episodes:

                        def step(number: int, episodes: list[Episode] = episodes) -> None:
                            episodes[number].step("true")

                        ours.append(rate(size.live, size.closed_seconds, step))
                    peer.append(rate(size.live, size.closed_seconds, call))
            self._add(
                f"steps a second, {size.live} callers, {words}",
                "1/s",
                statistics.median(ours),
                {"bare Ray actor": statistics.median(peer)},
                (Bar(CEILING_BAR, "bare Ray actor", at_least=True),),
            )

    # -- generate() -------------------------------------------------------------------------------

    def request(self) -> None:
        """SkyRL's generator, ours: mini-swe-agent's first question of each rollout, tokenized."""
        size = self.size
        rows = [self.tasks[number * len(self.tasks) // size.rows].model_dump_json() for number in range(size.rows)]
        submit = f"```mswea_bash_command\necho {_MINI_END}\n```"
        given = {
            "path": skyrl_path(self.report),
            "env": config_of(self.work, scaffold="mini"),
            "rows": rows,
            "times": size.times,
            "answer": submit,
        }
        done = subprocess.run(
            [sys.executable, "-B", "-m", "benches.training.first_request"],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=REPOSITORY,
        )
        if done.returncode:
            raise RuntimeError(f"generate() failed: {done.stderr.strip()[-600:]}")
        found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
        name = f"`generate()` to the first token request, {size.rows} rollouts of {len(self.tasks)} tasks, warm"
        last = statistics.median(each[-1] for each in found)
        self._add(f"{name}: the last", "s", last, {}, (Bar(REQUEST_BAR),))
        mean = statistics.median(statistics.fmean(each) for each in found)
        self._add("  the mean of them", "s", mean, PREPARATION)
        self._add("  the first", "s", statistics.median(each[0] for each in found))

    # -- a million rollouts -----------------------------------------------------------------------

    def tax(self) -> None:
        """One rollout at a time: what its worker spends on being a rollout at all."""
        size = self.size
        steps: list[float] = []
        shell: list[float] = []
        whole: list[float] = []
        for number in range(size.alone + 1):
            episode = Episode.open(self.config, self.tasks[number % len(self.tasks)])
            found = [episode.step("true") for _ in range(size.actions)]
            seconds = episode.opened + episode.end()
            if number:  # the first wakes what sleeps
                whole.append(seconds)
                steps += [each[0] for each in found]
                shell += [each[1] for each in found]
        action, rollout = statistics.median(steps), statistics.median(whole)
        peers = {name: hours(*parts) for name, parts in EARLIER.items()}
        peers |= self._swe_rex() | self._containers()
        scaffold = scaffold_seconds(self.config, self.tasks[0], size.actions)
        self._add(
            f"tax of {ROLLOUTS / 1e6:g} M rollouts of {ACTIONS} actions",
            "worker-hours",
            hours(action, rollout),
            peers,
            (Bar(TAX_BAR),),
        )
        self._add("  an action: there, `true` in the shell, and back", "ms", 1e3 * action)
        self._add("    of it the shell", "ms", 1e3 * statistics.median(shell))
        self._add("  a rollout: checkout, create, patch, a grade whose tests do nothing, close", "ms", 1e3 * rollout)
        self._add("  beside it: mini-swe-agent's own time, of as many", "worker-hours", hours(scaffold, 0.0))

    def _swe_rex(self) -> dict[str, float]:
        try:
            return {SWE_REX: hours(*swe_rex(self.size.actions))}
        except Absent as why:
            self.report.absent[SWE_REX] = str(why)
            return {}

    def _containers(self) -> dict[str, float]:
        """Docker: `exec` for each action, a container for the agent and one for its grade."""
        from benches.sandbox.peers.engines import Docker

        if self._docker is None:
            self.report.absent["docker"] = "left out of a quick run"
            return {}
        docker = Docker()
        try:
            docker.start(self._docker)
        except Absent as why:
            self.report.absent["docker"] = str(why)
            return {}
        try:
            self.report.versions["docker"] = docker.version()
            actions, rollouts = [], []
            for _ in range(min(5, self.size.alone)):
                seat, opened = docker.open()
                actions += [seat.true() for _ in range(5)]
                rollouts.append(2 * (opened + seat.close()))
            return {"docker": hours(statistics.median(actions), statistics.median(rollouts))}
        finally:
            docker.stop()

    # -- parts ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _episodes(self, config: EnvConfig, count: int) -> Iterator[list[Episode]]:
        shared_cluster(config)
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            tasks = [self.tasks[number % len(self.tasks)] for number in range(count)]
            episodes = list(pool.map(lambda task: Episode.open(config, task), tasks))
            try:
                yield episodes
            finally:
                list(pool.map(lambda episode: episode.env.close(), episodes))

    @contextlib.contextmanager
    def _bare(self, shells: bool = False) -> Iterator[Any]:
        """An actor in the Ray of our rollouts, as they have one."""
        shared_cluster(self.config)
        if shells:
            images = self.config.images
            actor = (
                ray.remote(BareShells)
                .options(num_cpus=0, max_concurrency=self.size.live)
                .remote(images.store, images.cache, self.tasks[0])
            )
        else:
            actor = ray.remote(Bare).options(num_cpus=0).remote()
            ray.get(actor.nothing.remote())
        try:
            yield actor
        finally:
            if shells:
                ray.get(actor.close.remote(), timeout=60)
            ray.kill(actor)

    def _add(
        self, name: str, unit: str, ours: float, peers: dict[str, float] | None = None, bars: tuple[Bar, ...] = ()
    ) -> None:
        self.report.rows.append(Row(name, unit, ours, dict(peers or {}), bars))


def hours(action: float, rollout: float) -> float:
    """Worker-hours of the run, from seconds."""
    return ROLLOUTS * (ACTIONS * action + rollout) / 3600


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def thinking(callers: int, turns: int, call: Callable[[int], None]) -> None:
    """Each caller calls `turns` times, `PAUSE` after its last answer; they begin spread over a pause."""
    chance = random.Random(0)
    begin = [chance.uniform(0, PAUSE) for _ in range(callers)]

    def one(number: int) -> None:
        time.sleep(begin[number])
        for _ in range(turns):
            call(number)
            time.sleep(PAUSE)

    in_threads([functools.partial(one, number) for number in range(callers)])


def rate(callers: int, seconds: float, call: Callable[[int], None]) -> float:
    """Calls a second of callers that never pause."""
    done = [0] * callers
    ready = threading.Barrier(callers)
    times: list[tuple[float, float]] = []

    def one(number: int) -> None:
        call(number)
        ready.wait(60)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            call(number)
            done[number] += 1
        times.append((started, time.perf_counter()))

    in_threads([functools.partial(one, number) for number in range(callers)])
    return sum(done) / (max(end for _, end in times) - min(start for start, _ in times))


def in_threads(jobs: list[Callable[[], None]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def skyrl_path(report: Report) -> str:
    """Where SkyRL's generator is, fetched once; "" where it is installed with all it needs. Raises `Absent`."""
    from importlib import metadata, util

    if util.find_spec("skyrl") and util.find_spec("torch"):
        report.versions["skyrl"] = metadata.version("skyrl")
        return ""
    from tests.skyrl.environment import VERSION, skyrl_directory

    try:
        path = str(skyrl_directory())
    except (subprocess.SubprocessError, OSError) as error:
        raise Absent(f"SkyRL cannot be fetched: {error}") from error
    report.versions["skyrl"] = VERSION
    return path


def scaffold_seconds(config: EnvConfig, task: Task, actions: int) -> float:
    """What mini-swe-agent itself takes for an action: all but the commands, with a model that answers at once."""
    from skyrl_minisandbox.images import Cache, Store
    from skyrl_minisandbox.sandbox import Sandbox
    from skyrl_minisandbox.scaffolds import load_scaffold

    left = ["```mswea_bash_command\ntrue\n```"] * actions
    commands: list[float] = []

    class Quick(Policy):
        def query(self, messages: list[dict[str, str]]) -> str:
            return left.pop() if left else f"```mswea_bash_command\necho {_MINI_END}\n```"

    class Timed(Sandbox):
        def run(self, *args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return super().run(*args, **more)
            finally:
                commands.append(time.perf_counter() - started)

    store, cache = Store(Path(config.images.store)), Cache(Path(config.images.cache))
    image = store.find(task.recipe.digest())
    assert image is not None
    scaffold = load_scaffold("mini")
    with cache.checkout(image, store) as checkout, Timed(checkout.sandbox_spec()) as sandbox:
        started = time.perf_counter()
        scaffold.run(task.public(), sandbox, Quick())
        seconds = time.perf_counter() - started
    return (seconds - sum(commands)) / actions


_MINI_END = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
