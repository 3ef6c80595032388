"""Whole jobs: SkyRL's entry point, Ray, HTTP to the engine; and nothing left of them, whichever way they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from skyrl_minisandbox.claims import sweep
from tests.skyrl.environment import VERSIONS
from tests.support import needs
from tests.training.jobs import OURS, SIMULATION, Bench, Job, gone

pytestmark = [pytest.mark.night, needs("userns", "overlay", "git", "network")]


@pytest.fixture(scope="module", params=VERSIONS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(request.param, tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


@pytest.fixture
def start(bench: Bench) -> Iterator[object]:
    """`bench.start`, each job of which is gone when the test is over."""
    jobs: list[Job] = []

    def begin(*arguments: str, **more: Any) -> Job:
        jobs.append(bench.start(*arguments, **more))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.kill()


def test_skyrls_own_command_with_one_key_more_evaluates(bench: Bench, start) -> None:
    with bench.engine() as engine:
        job = start(
            engine,
            "trainer.override_entrypoint=skyrl_minisandbox.training.entrypoint_generate",
            module="skyrl.train.entrypoints.main_base",
        )
        code = job.wait()
    log = job.log()
    assert code == 0, log[-6000:]
    assert "eval/small/pass_at_1: 1.0" in log or "eval/all/pass_at_1: 1.0" in log, log[-6000:]
    assert "environment/resolved_mean" in log


@pytest.mark.parametrize(
    ("number", "nohup"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["SIGINT", "SIGTERM", "SIGTERM-nohup"],
)
def test_an_interrupted_job_ends_in_order(bench: Bench, start, number: signal.Signals, nohup: bool) -> None:
    """Every rollout is closed by the job itself, Ray stops, nothing is left for a sweep."""
    command = "sleep 98761.25"
    with bench.engine([command]) as engine:
        job = start(engine, *SIMULATION, f"{OURS}.rollout.step=600", nohup=nohup)
        job.until(command)
        everything = job.processes()
        job.process.send_signal(number)
        code = job.wait(60)  # below `entrypoint.ENDING`, after which it would be ended without order
    assert code == 130, job.log()[-6000:]
    assert job.log().rstrip().endswith("minisandbox: interrupted")
    assert gone(everything) == []
    assert sweep(bench.path / "cache") == []


def test_a_job_that_was_killed_leaves_nothing_to_the_next(bench: Bench, start) -> None:
    command = "sleep 98762.25"
    with bench.engine([command]) as engine:
        job = start(engine, *SIMULATION)
        job.until(command)
        everything = job.processes()
        job.process.kill()
        names = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        agents = [process for process in everything if process.command.startswith(names)]
        assert gone([process for process in everything if process not in agents]) == []
        # Ray's (2.57) tell a GCS that is no longer there why they end, for a minute.
        assert gone(agents, 150.0) == []
    with bench.engine() as engine:
        code = start(engine, *SIMULATION).wait()
    assert code == 0
    assert sweep(bench.path / "cache") == [], "the second job swept what the first had left"


def test_a_job_whose_process_dies_says_so_and_is_not_run_again(bench: Bench, start) -> None:
    command = "sleep 98763.25"
    with bench.engine([command]) as engine:
        job = start(engine, *SIMULATION)
        job.until(command)
        everything = job.processes()
        (task,) = [process for process in everything if process.command.startswith("ray::train")]
        os.kill(task.pid, signal.SIGKILL)
        code = job.wait(120)
    assert code == 1, job.log()[-6000:]
    assert "minisandbox: the process of the job ended by itself" in job.log()
    assert f"hint: its last lines are above; those of engines and workers in {bench.path}/log" in job.log()
    assert gone(everything) == []


@pytest.mark.parametrize("trained", [True, False], ids=["fully-async", "evaluation"])
def test_rollouts_that_mostly_fail_end_the_job_with_their_causes(bench: Bench, start, trained: bool) -> None:
    """Where SkyRL leaves its process by `os._exit`, too."""
    failing = [f"{OURS}.rollout.setup=0.001", f"{OURS}.training.retries=0"]
    with bench.engine() as engine:
        if trained:
            job = start(engine, *SIMULATION, *failing)
        else:
            job = start(engine, *failing, module="skyrl_minisandbox.training.entrypoint_generate")
        code = job.wait()
    said = job.log().rstrip().splitlines()[-2:]
    assert code == 1, job.log()[-6000:]
    assert said[0].startswith("minisandbox: ") and "rollouts failed for reasons of ours" in said[0]
    assert said[1].startswith("hint: minisandbox doctor")


def test_two_jobs_in_one_process(bench: Bench, start) -> None:
    """As a sweep of Hydra's basic launcher runs them."""
    code = (
        "import sys; from skyrl_minisandbox.training.entrypoint import run; "
        "print('rewards', [run(sys.argv[1:], 'generate')['eval/all/avg_score'] for _ in range(2)])"
    )
    with bench.engine() as engine:
        job = start(engine, code, module="")
        assert job.wait(500) == 0, job.log()[-6000:]
    assert "rewards [1.0, 1.0]" in job.log()


