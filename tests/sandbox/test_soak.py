"""Many lives and many deaths: what the machine holds is what it held before. Both footprints are printed."""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests import footprint
from tests.footprint import Footprint
from tests.machine import descendants
from tests.support import seconds

ROOT = Path(__file__).resolve().parents[2]

@pytest.fixture
def adopting() -> Iterator[None]:
    with footprint.adopting():
        yield


def _compare(before: Footprint, after: Footprint, lives: int) -> None:
    print(after.table(before))
    assert after.more(before) == []
    assert after.leaked(before, lives) == []


@pytest.mark.parametrize(
    "lives", [pytest.param(1000, marks=pytest.mark.ci), pytest.param(10_000, marks=pytest.mark.night)]
)
def test_lives_leave_nothing(lives: int, spec: SandboxSpec, adopting: None, launcher: LauncherClient) -> None:
    if "ray" in sys.modules:  # what its threads allocate meanwhile is not ours: a process of its own tells
        name = f"{__file__}::test_lives_leave_nothing[{lives}]"
        argv = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--tier=all", name]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=seconds(1800), check=False)
        print(done.stdout)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
        return
    with Sandbox(spec, launcher) as warm:
        warm.run("true")
    gc.collect()
    before = footprint.resting()
    started = time.monotonic()
    for life in range(lives):
        with Sandbox(spec, launcher) as sandbox:
            if life % 3 == 0:
                assert sandbox.shell().run(f"sleep 1000 & echo {life}").output == f"{life}\n"
            elif life % 3 == 1:
                assert sandbox.run(["echo", str(life)]).output == f"{life}\n"
            else:
                sandbox.write_file("/testbed/file", b"x" * 4096)
    spent = time.monotonic() - started
    print(f"{lives} lives in {spent:.1f} s, {1000 * spent / lives:.2f} ms each")
    gc.collect()
    after = footprint.settled(before)
    _compare(before, after, lives)


@pytest.mark.parametrize(
    "deaths", [pytest.param(10, marks=pytest.mark.ci), pytest.param(100, marks=pytest.mark.night)]
)
def test_owners_killed_at_random_moments_leave_nothing(
    deaths: int, layer: Path, tmp_path: Path, adopting: None
) -> None:
    """kill -9 of the owner alone: within a second everything of it has ended by itself, without a sweep."""
    seed = int(os.environ.get("MINISANDBOX_SEED") or time.time())
    print(f"MINISANDBOX_SEED={seed}")
    chance = random.Random(seed)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = footprint.resting([temporary])  # a launcher of this session makes sandboxes ahead: not meanwhile
    known = {process.pid for process in descendants(os.getpid())}
    slowest, most = 0.0, 0
    for death in range(deaths):
        moment = chance.uniform(0, 1.5)
        owner = subprocess.Popen(
            [sys.executable, "-m", "tests.sandbox.owner", str(layer), str(seed + death)], cwd=ROOT,
            stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(temporary)},
        )
        assert owner.stdout is not None
        select.select([owner.stdout], [], [], seconds(30))
        time.sleep(moment)
        held = len(descendants(owner.pid))
        assert owner.poll() is None, f"death {death}: the owner ended by itself"
        owner.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        owner.wait()
        owner.stdout.close()
        left = footprint.left_after(known, 1)
        assert left == [], f"death {death} at {moment:.3f} s, {held} processes: still there: {footprint.doing(left)}"
        slowest, most = max(slowest, time.monotonic() - killed), max(most, held)
    print(f"{deaths} deaths, with up to {most} processes below an owner; the slowest end took {slowest:.3f} s")
    assert most > 2  # a launcher and sandboxes: the owners did work
    after = footprint.settled(before, [temporary])
    _compare(before, after, deaths)
