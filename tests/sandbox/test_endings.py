"""A sandbox that ends by what is done in it says so as a result, never as an exception of ours."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from skyrl_minisandbox.sandbox.watch import is_beyond
from tests.support import needs, seconds

MIB = 1 << 20
ON_DISK = Limits(memory=512 * MIB, processes=200, disk=32 * MIB, inodes=2000)


@pytest.mark.parametrize(
    "fill",
    [
        "for i in $(seq 100); do head -c 1M /dev/urandom > f$i; done; sleep 60",
        "mkdir many; cd many; touch $(seq 3000); sleep 60",
        "mkdir -p a/b/c; cd a/b/c; for i in $(seq 100); do head -c 1M /dev/urandom > f$i; done; sleep 60",
    ],
    ids=["bytes", "files", "deep"],
)
def test_an_upper_on_disk_beyond_its_limits_ends_the_sandbox_and_no_other(
    spec: SandboxSpec, tmp_path: Path, fill: str
) -> None:
    on_disk = dataclasses.replace(spec, limits=ON_DISK)
    with (
        Sandbox(dataclasses.replace(on_disk, upper=tmp_path / "one")) as sandbox,
        Sandbox(dataclasses.replace(on_disk, upper=tmp_path / "two")) as other,
    ):
        other.run("head -c 20M /dev/urandom > below-the-limit")
        assert sandbox.ended_by == ""
        result = sandbox.run(fill, timeout=seconds(30))
        assert (result.disk_full, result.exit_code, result.timed_out) == (True, 137, False), result
        assert "limits.disk (33554432 bytes)" in result.output and "limits.inodes (2000)" in result.output
        assert sandbox.ended_by == "disk_full"
        later = sandbox.shell().run("true")
        assert later.disk_full and later.exit_code == 137
        with pytest.raises(SandboxGone):
            sandbox.read_file("/etc/passwd")
        assert sandbox.ended_by == "disk_full"
        time.sleep(1.5)
        assert other.run("echo on").output == "on\n" and other.ended_by == ""
    assert sandbox.ended_by == "disk_full"


def test_who_looks_at_uppers_ends_with_the_launcher_and_is_replaced_when_it_ends(
    spec: SandboxSpec, tmp_path: Path
) -> None:
    launcher = LauncherClient()

    def watchers() -> list[int]:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "minisandbox-w\n"]

    def the_watcher() -> int:
        """A child has its name a moment after it was forked."""
        deadline = time.monotonic() + seconds(5)
        while not watchers() and time.monotonic() < deadline:
            time.sleep(0.01)
        (found,) = watchers()
        return found

    with Sandbox(spec, launcher) as on_tmpfs:
        assert on_tmpfs.run("true").exit_code == 0
        if launcher.facts["tmpfs_upper"]:
            assert watchers() == []
    with Sandbox(dataclasses.replace(spec, limits=ON_DISK, upper=tmp_path / "u"), launcher) as sandbox:
        first = the_watcher()
        os.kill(first, signal.SIGKILL)
        result = sandbox.run("touch $(seq 3000); sleep 60", timeout=seconds(30))
        assert result.disk_full and sandbox.ended_by == "disk_full"
        second = the_watcher()
        assert second != first
    os.kill(launcher.pid, signal.SIGKILL)
    deadline = time.monotonic() + seconds(5)
    while Path(f"/proc/{second}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{second}").exists()
    launcher.close()
    LauncherClient().close()  # sweeps what the killed one left


def test_one_file_larger_than_the_disk_limit_cannot_be_made(spec: SandboxSpec, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.write_bytes(bytes(33 * MIB))
    with Sandbox(dataclasses.replace(spec, limits=ON_DISK, upper=tmp_path / "u")) as sandbox:
        done = sandbox.run("head -c 40M /dev/zero > one; stat -c %s one; sleep 2")  # a look at it, or two
        assert done.output.endswith(f"{30 * MIB}\n") and sandbox.ended_by == ""
        assert sandbox.run("rm one; head -c 40M /dev/zero > one").disk_full
        assert not sandbox.run("rm one").disk_full
        for write in (lambda: sandbox.write_file("two", b"x" * (33 * MIB)), lambda: sandbox.put_tree(two, "two")):
            with pytest.raises(OSError) as full:
                write()
            assert full.value.errno == errno.ENOSPC
            sandbox.run("rm two")


def test_a_tree_is_measured_as_the_disk_has_it(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    (tmp_path / "a").write_bytes(os.urandom(MIB))
    for number in range(10):
        os.link(tmp_path / "a", tmp_path / f"link{number}")
    (tmp_path / "out").symlink_to("/")
    top = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    held = len(os.listdir("/proc/self/fd"))
    try:
        assert not is_beyond(top, 2 * MIB, 13)
        assert is_beyond(top, MIB - 100, 13)
        assert is_beyond(top, 2 * MIB, 12)
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=top)
        for _ in range(1500):  # deeper than is looked at: it ends, and opens no more than it may
            os.mkdir("d", dir_fd=here)
            here, above = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here), here
            os.close(above)
        os.close(here)
        assert not is_beyond(top, 20 * MIB, 2000)
        assert len(os.listdir("/proc/self/fd")) == held
    finally:
        os.close(top)
        remove_deep(tmp_path / "d")


def remove_deep(path: Path) -> None:
    """`d/d/d…`, deeper than a path can name."""
    above = path.parent / "above"
    while path.exists():
        if (path / "d").exists():
            (path / "d").rename(above)
            path.rmdir()
            above.rename(path)
        else:
            path.rmdir()


@needs("root", "cgroup")
def test_a_sandbox_whose_init_finds_no_memory_tells_it(open_sandbox: Callable[..., Sandbox]) -> None:
    """System V segments stay without any process that could be killed for them."""
    sandbox = open_sandbox(limits=Limits(memory=96 * MIB, disk=8 * MIB))
    fill = (
        "import ctypes; c = ctypes.CDLL(None); c.shmat.restype = ctypes.c_void_p\n"
        "for n in range(100):\n a = c.shmat(c.shmget(n + 1, 1 << 20, 0o1600), None, 0); ctypes.memset(a, 1, 1 << 20)"
    )
    result = sandbox.run(["python3", "-c", fill], timeout=seconds(30))
    assert result.oom_killed and sandbox.ended_by == ""
    assert sandbox.run("true").exit_code in (0, 137)
    with pytest.raises(SandboxGone):  # init's own memory: there is nobody else to be killed
        sandbox.write_file("/dev/shm/more", bytes(20 * MIB))
    result = sandbox.run("true")
    assert result.oom_killed and result.exit_code == 137 and "limits.memory" in result.output
    assert sandbox.ended_by == "oom"


def test_an_init_that_is_killed_from_outside_is_our_fault(sandbox: Sandbox) -> None:
    os.kill(sandbox.pid, signal.SIGKILL)
    with pytest.raises(SandboxGone):
        sandbox.run("true")
    assert sandbox.ended_by == ""


def test_the_default_deadline_of_commands(open_sandbox: Callable[..., Sandbox], spec: SandboxSpec) -> None:
    sandbox = open_sandbox(limits=dataclasses.replace(spec.limits, command_seconds=0.5))
    assert sandbox.run("sleep 60").timed_out and sandbox.shell().run("sleep 60").timed_out
    assert not sandbox.run("sleep 1", timeout=seconds(20)).timed_out


@pytest.mark.parametrize(
    "field, value",
    [
        ("memory", 0), ("memory", -1), ("memory", 1 << 70), ("memory", 4e9), ("processes", 0), ("processes", 1 << 23),
        ("cpu_weight", 0), ("cpu_weight", 10001), ("disk", 0), ("inodes", 0), ("open_files", 0), ("core", -1),
        ("output", 0), ("command_seconds", 0), ("command_seconds", float("nan")), ("command_seconds", "5"),
        ("processes", True),
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SandboxError, match=rf"limits\.{field} is "):
        Limits(**{field: value})  # type: ignore[arg-type]
