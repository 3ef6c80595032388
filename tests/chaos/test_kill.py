"""kill -9 of the driver: what it leaves is gone at the latest when the next command has run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import living_processes
from tests.support import REPOSITORY, needs

pytestmark = [pytest.mark.ci, needs("userns", "overlay", "network", "ray")]

TASKS = ["inflection-0.3.1", "xmltodict-0.12.0", "humanize-4.12.0", "jinja2-3.1.5"]
LONGEST = 12.0
"""Seconds within which a run of these tasks through Ray is busy with one thing or another."""

# Both commands run below one subreaper (tests/orphans.py), so that a process of either is seen wherever it hangs.
SCRIPT = """
"$PYTHON" -m skyrl_minisandbox.cli.main rollout scaffold=gold "$@" out="$TOP/killed" >"$TOP/killed.log" 2>&1 &
driver=$!
sleep "$MOMENT"
kill -KILL "$driver" 2>/dev/null && echo killed
wait "$driver" 2>/dev/null
exec "$PYTHON" -m skyrl_minisandbox.cli.main rollout scaffold=gold "$@" out="$TOP/next"
"""


def dead_cgroups() -> set[str]:
    """Cgroups of launchers that are no more; their names hold the launcher's pid and start time."""
    living = living_processes()
    found = set()
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        for name in names:
            match = re.fullmatch(r"minisandbox-(\d+)-(\d+)", name)
            if match:
                process = living.get(int(match[1]))
                if process is None or str(process.started) != match[2]:
                    found.add(f"{directory}/{name}")
    return found


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A temporary directory with a short path: Ray puts sockets below it, whose paths have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ms-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(number, marks=pytest.mark.night) for number in (2, 3, 4))])
def test_nothing_is_left_after_kill_9_and_the_next_command(
    number: int, tmp_path: Path, store_directory: Path, short_directory: Path
) -> None:
    moment = random.uniform(0.2, LONGEST)
    print(f"killed after {moment:.2f} s")
    dead_before = dead_cgroups()
    temporary = short_directory
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHON": sys.executable,
        "TMPDIR": str(temporary),
        "TOP": str(tmp_path),
        "MOMENT": f"{moment:.2f}",
    }
    environment.pop("RAY_ADDRESS", None)
    overrides = [f"tasks.ids=[{','.join(TASKS)}]", f"images.store={store_directory}", f"images.cache={cache}"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.orphans", "15", "bash", "-c", SCRIPT, "bash", *overrides],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left behind" not in done.stderr, done.stderr
    assert f"mean reward 1.000 over {len(TASKS)} of {len(TASKS)} rollouts" in done.stdout
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert list(temporary.iterdir()) == []
    for name in ("aside", "claims"):
        assert list((cache / name).iterdir()) == [], name
    # Those of others, in cgroups that we are not in, are not ours to sweep.
    assert dead_cgroups() <= dead_before
    # Of the killed run's directory only what a run directory has; every line that got written is whole.
    killed = tmp_path / "killed"
    known = {"results.jsonl", "predictions.jsonl", "config.yaml", "driver.log", "trajectories", "grades", "logs"}
    if killed.exists():
        assert {path.name for path in killed.iterdir()} <= known
        for line in (killed / "results.jsonl").read_text().splitlines():
            assert json.loads(line)["task_id"] in TASKS
