"""x16 to x21: processes, memory, disk, inodes, output and files without end, inside of the limits of a spec.

While each goes off the machine can fork, the second sandbox answers, and afterwards the limit that was hit is told.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import CommandResult, Limits, Sandbox
from tests.security.conftest import Yard, within
from tests.support import seconds

MIB = 1 << 20
pytestmark = pytest.mark.ci

LIMITS = Limits(memory=512 * MIB, processes=200, disk=96 * MIB, inodes=20_000, output=4 * MIB)


def go_off(
    yard: Yard, sandbox: Sandbox, *argv: str, user: str | None = None, timeout: float = 60
) -> CommandResult:
    """Run a bomb on a thread, and meanwhile look whether the machine and the witness go on."""
    results: list[CommandResult | BaseException] = []

    def bomb() -> None:
        try:
            results.append(yard.python(sandbox, "inside.bombs", *argv, user=user, timeout=timeout))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=bomb, daemon=True)
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        started = time.monotonic()
        subprocess.run(["true"], check=True, timeout=seconds(30))
        answer = within(30, lambda: yard.witness.run("echo on", timeout=seconds(25)))
        assert answer.output == "on\n", answer
        slowest = max(slowest, time.monotonic() - started)
        thread.join(0.1)
    print(f"the slowest answer beside it took {slowest:.2f} s")
    assert isinstance(results[0], CommandResult), results[0]
    return results[0]


def as_a_disk_upper(yard: Yard) -> bool:
    return not yard.launcher.facts["tmpfs_upper"]


def test_a_fork_bomb_meets_its_limit(yard: Yard, who: str | None) -> None:
    """x16: ten seconds of it."""
    sandbox = yard.open(limits=LIMITS)
    result = go_off(yard, sandbox, "fork", user=who, timeout=10)
    assert result.timed_out and "EAGAIN" in result.output
    within(60, sandbox.freeze)
    after = within(60, lambda: sandbox.run("echo on; ps ax 2>/dev/null | wc -l", timeout=seconds(30)))
    assert after.output.startswith("on\n") and after.exit_code == 0, after


@pytest.mark.parametrize("what", ["children", "tmpfs", "memfd", "sysv", "pipes"])
def test_a_memory_bomb_kills_only_inside(yard: Yard, who: str | None, what: str) -> None:
    """x17: 2 GiB at most, of which the cgroup lets 512 MiB through. Without one only the rlimits stand."""
    victim = subprocess.Popen(["sleep", "100002"])
    try:
        sandbox = yard.open(limits=LIMITS)
        result = go_off(yard, sandbox, what, user=who, timeout=120)
        assert victim.poll() is None
        told = result.oom_killed or "E" in result.output
        if yard.launcher.facts["memory_cgroup"]:
            if what == "children":
                assert result.oom_killed, result
            assert told or what == "pipes", result  # pipes: their own limit on a user's pages comes first
        after = within(60, lambda: sandbox.run("echo on", timeout=seconds(30)))
        assert after.output == "on\n", after
    finally:
        victim.kill()
        victim.wait()


def _used(sandbox: Sandbox) -> int:
    """Bytes that the file systems inside hold: what the machine loses to them."""
    script = (
        "import os\nseen = {}\nfor place in ('/', '/tmp', '/var/tmp', '/dev/shm', '/dev'):\n"
        "    s = os.statvfs(place)\n    seen[os.stat(place).st_dev] = (s.f_blocks - s.f_bfree) * s.f_frsize\n"
        "print(sum(seen.values()))"
    )
    return int(sandbox.run(["/usr/bin/python3", "-c", script], timeout=seconds(30)).output)


@pytest.mark.parametrize("what", ["disk", "inodes"])
def test_a_disk_bomb_takes_no_more_than_the_limit(yard: Yard, who: str | None, what: str) -> None:
    """x18, x19: in /, /tmp, /var/tmp and /dev/shm."""
    if as_a_disk_upper(yard):
        pytest.skip("the upper is on disk: a watcher ends the sandbox, see tests/sandbox")
    sandbox = yard.open(limits=dataclasses.replace(LIMITS, memory=1024 * MIB))
    result = go_off(yard, sandbox, what, user=who, timeout=120)
    assert "ENOSPC" in result.output or "EDQUOT" in result.output, result.output
    assert result.disk_full, result
    shm = 512 * MIB  # half of the memory limit
    assert _used(sandbox) <= LIMITS.disk + shm + 8 * MIB
    after = within(60, lambda: sandbox.run("rm -rf /tmp/* /var/tmp/* /dev/shm/* /bomb* /inodes /fallocate; echo on",
                                           timeout=seconds(60)))
    assert after.output == "on\n" and not after.disk_full


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FLOODS = {
    "lines": "yes a line of output | head -c {size}",
    "no newline": "head -c {size} /dev/zero | tr '\\0' x",
    "NULs": "head -c {size} /dev/zero",
    "standard error": "head -c {size} /dev/zero >&2",
    "both": "head -c {size} /dev/zero & head -c {size} /dev/zero >&2; wait",
}


def _flood(yard: Yard, size: int, flood: str) -> None:
    sandbox = yard.open(limits=LIMITS)
    shell = sandbox.shell()
    command = FLOODS[flood].format(size=size) + "; (exit 7)"
    before = _resident()
    for result in (
        within(300, lambda: sandbox.run(command, timeout=seconds(280))),
        within(300, lambda: shell.run(command, timeout=seconds(280))),
    ):
        assert (result.exit_code, result.truncated, result.timed_out) == (7, True, False)
        assert len(result.stdout) + len(result.stderr) <= 2 * LIMITS.output + 1000
    assert _resident() - before < 64 * MIB
    # From behind a command's end: not in the next one's output.
    shell.run(f"(sleep 0.2; {FLOODS[flood].format(size=size // 10)}) &")
    for _ in range(20):
        assert within(30, lambda: shell.run("echo on", timeout=seconds(20))).output == "on\n"
        time.sleep(0.02)
    assert _resident() - before < 64 * MIB


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_output_is_cut(yard: Yard, flood: str) -> None:
    """x20: half a gigabyte."""
    _flood(yard, 512 * MIB, flood)


@pytest.mark.night
@pytest.mark.parametrize("flood", ["lines", "both"])
def test_ten_gigabytes_of_output_are_cut(yard: Yard, flood: str) -> None:
    """x20, as much as the row says."""
    _flood(yard, 10 << 30, flood)


def _many_files(yard: Yard, place: Path, count: int, limits: Limits) -> None:
    sandbox = yard.open(limits=limits)
    result = go_off(yard, sandbox, "files", str(count), timeout=900)
    assert result.exit_code == 0 and ("made" in result.output or "ENOSPC" in result.output), result
    before = _resident()

    def told(attempt: Any) -> Any:
        try:
            return within(600, attempt)
        except (OSError, SandboxError) as error:
            return error

    changes = told(lambda: sandbox.changes())
    assert isinstance(changes, OSError) or len(changes) >= min(count, limits.inodes) // 2, changes
    few = told(lambda: sandbox.changes(limit=10))
    assert isinstance(few, OSError), few
    got = told(lambda: sandbox.get_tree("/testbed/many", place / "got", max_members=1000))
    assert isinstance(got, OSError), got
    got = told(lambda: sandbox.get_tree("/testbed/many", place / "whole"))
    assert isinstance(got, list | OSError), got
    snapshot = told(lambda: sandbox.snapshot())
    assert not isinstance(snapshot, BaseException), snapshot
    assert sandbox.run("ls /testbed/many/0 | wc -l", timeout=seconds(60)).output == "1000\n"
    del changes
    assert _resident() - before < 1024 * MIB
    within(120, sandbox.close)
    del snapshot


def test_forty_thousand_files_are_listed_frozen_and_taken_out(yard: Yard, tmp_path: Path) -> None:
    """x21"""
    _many_files(yard, tmp_path, 40_000, dataclasses.replace(LIMITS, inodes=60_000, memory=1024 * MIB, disk=512 * MIB))


def test_more_files_than_the_limit_stop_at_the_limit(yard: Yard, tmp_path: Path) -> None:
    """x21"""
    if as_a_disk_upper(yard):
        pytest.skip("the upper is on disk: a watcher ends the sandbox, see tests/sandbox")
    _many_files(yard, tmp_path, 40_000, dataclasses.replace(LIMITS, inodes=20_000, memory=1024 * MIB, disk=512 * MIB))


@pytest.mark.night
def test_a_million_files_are_listed_frozen_and_taken_out(yard: Yard, tmp_path: Path) -> None:
    """x21, as many as the row says."""
    gib = 1024 * MIB
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * gib:
        pytest.skip("less than 8 GiB of memory are free")
    # Half of what memory has beyond the disk is for inodes, see `Limits.inodes`.
    _many_files(yard, tmp_path, 1_000_000, Limits(memory=14 * gib, disk=8 * gib, inodes=1_100_000, processes=200))
