"""The bombs once more, by code that real runners import and call: whatever it does to them is scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.config import GradingConfig, ScaffoldConfig
from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rollout import Rollout
from skyrl_minisandbox.sandbox import Limits
from skyrl_minisandbox.tasks.task import Task
from skyrl_minisandbox.turn import Finished
from tests.rewards.bombs import DEADLY, LASTING, PASSING
from tests.rewards.hacks.hack import patch_of
from tests.rewards.hacks.project import FILES, GOLD_WEIGHTS
from tests.rewards.hacks.suite import Bench
from tests.small import request
from tests.support import require

pytestmark = pytest.mark.ci

LIMITS = Limits(memory=512 << 20, disk=64 << 20, processes=128, inodes=8192)
SCORED = {Outcome.RESOLVED, Outcome.UNRESOLVED, Outcome.TESTS_TIMEOUT, Outcome.TAMPERED}

BY_PYTHON: dict[str, str] = {
    "descriptors": "os.closerange(0, 65536)",
    "descriptors overwritten": "[os.dup2(os.open('/dev/null', os.O_RDWR), n) for n in range(200)]",
    "killed": "os.kill(os.getpid(), 9)",
    "stopped": "os.kill(os.getpid(), 19)",
    "crashed": "__import__('ctypes').string_at(0)",
    "aborted": "os.abort()",
    "left": "os._exit(0)",
    "left like a missing program": "os._exit(127)",
    "replaced": "os.execvp('true', ['true'])",
    "missing": "os.execvp('bash', ['bash', '-c', 'exec no-such-program'])",
    "deep": "sys.setrecursionlimit(10**9) or [f := lambda: f()] and f()",
    "memory": "[bytearray(1 << 26) for _ in range(64)]",
    "its limits taken": "__import__('resource').setrlimit(7, (3, 3))",
    "group killed": "os.killpg(0, 9)",
    "threads": "[__import__('threading').Timer(9, print).start() for _ in range(500)]",
    "log removed": "[os.truncate('/proc/self/fd/' + n, 0) for n in os.listdir('/proc/self/fd') "
    "if os.path.isfile('/proc/self/fd/' + n)]",
    "own packages removed": "__import__('shutil').rmtree(os.path.dirname(os.__file__), ignore_errors=True)",
    "environment removed": "subprocess.run(['rm', '-rf', '/opt/env', '/tmp', '/var/tmp', '/testbed'])",
}


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, store_directory: Path, cache_directory: Path
) -> Iterator[Bench]:
    require("userns", "overlay", "git", "network")
    yield Bench(Store(store_directory), Cache(cache_directory), Sources(tmp_path_factory.mktemp("sources")))


def patch(statement: str, where: str) -> str:
    """The fix, and one statement of Python: when the module is imported, or at the first call."""
    text = GOLD_WEIGHTS.replace("UNITS = {", "import os, subprocess, sys\n\n_done = []\n\nUNITS = {", 1)
    if where == "import":
        text += f"\n\n{statement}\n"
    else:
        first = '    """Grams in a text such as `2 kg`."""\n'
        assert first in text
        text = text.replace(first, f"{first}    if not _done:\n        _done.append(1)\n        {statement}\n")
    return patch_of(FILES, {"parcel/weights.py": text})


def graded(bench: Bench, runner: str, mode: str, given: str, timeout: float = 6.0) -> Finished:
    task: Task = bench.task(runner)
    task = task.model_copy(update={"tests": task.tests.model_copy(update={"timeout": timeout})})
    asked = request(task, limits=LIMITS, scaffold=ScaffoldConfig("empty"), grading=GradingConfig(mode=mode))
    with bench.opener(task):
        finished = Rollout(asked, store=bench.store, cache=bench.cache, node="here").grade(given).finished
    assert finished is not None
    return finished


def scored(finished: Finished, outcomes: set[Outcome]) -> None:
    record = finished.record
    assert record.outcome in outcomes, (record, finished.log)
    assert record.reward == (1.0 if record.outcome is Outcome.RESOLVED else 0.0)
    assert (finished.event, finished.repeat) == ("", False)


RUNNERS = pytest.mark.parametrize("runner", ["pytest", "unittest"])
MODES = pytest.mark.parametrize("mode", ["protected", "official"])
MOST_AT_NIGHT = pytest.mark.parametrize(
    ("runner", "where"),
    [
        ("pytest", "call"),
        pytest.param("pytest", "import", marks=pytest.mark.night),
        pytest.param("unittest", "call", marks=pytest.mark.night),
        pytest.param("unittest", "import", marks=pytest.mark.night),
    ],
)
BASH = "subprocess.run(['bash', '-c', {!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"


@RUNNERS
@MODES
def test_the_fix_alone_is_paid(bench: Bench, runner: str, mode: str) -> None:
    scored(graded(bench, runner, mode, patch("pass", "call")), {Outcome.RESOLVED})


@pytest.mark.parametrize("runner", ["pytest", pytest.param("unittest", marks=pytest.mark.night)])
@pytest.mark.parametrize("bomb", [pytest.param(bomb, id=name) for name, bomb in PASSING.items()])
def test_a_bomb_that_is_over_when_it_is_over_costs_an_honest_fix_nothing(
    bench: Bench, runner: str, bomb: str
) -> None:
    given = patch(BASH.format(bomb), "call")
    scored(graded(bench, runner, "protected", given, timeout=60.0), {Outcome.RESOLVED})


@MOST_AT_NIGHT
@pytest.mark.parametrize("bomb", [pytest.param(bomb, id=name) for name, bomb in {**DEADLY, **LASTING}.items()])
def test_a_bomb_that_is_not_is_scored(bench: Bench, runner: str, where: str, bomb: str) -> None:
    scored(graded(bench, runner, "protected", patch(BASH.format(bomb), where)), SCORED)


@MOST_AT_NIGHT
@pytest.mark.parametrize("statement", [pytest.param(text, id=name) for name, text in BY_PYTHON.items()])
def test_what_code_does_to_its_runner_is_scored(bench: Bench, runner: str, where: str, statement: str) -> None:
    scored(graded(bench, runner, "protected", patch(statement, where)), SCORED)


@pytest.mark.parametrize("name", ["left like a missing program", "own packages removed", "environment removed"])
@RUNNERS
def test_a_runner_that_the_patch_breaks_is_no_runner_that_the_image_lacks(
    bench: Bench, runner: str, name: str
) -> None:
    for mode in ("protected", "official"):
        scored(graded(bench, runner, mode, patch(BY_PYTHON[name], "import")), SCORED)
