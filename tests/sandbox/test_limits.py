"""Limits are told as results; the sandbox and the machine live on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Limits, Sandbox
from tests.support import needs, seconds

MIB = 1 << 20


def test_a_full_disk_is_told(sandbox: Sandbox) -> None:
    result = sandbox.run("head -c 100000000 /dev/zero > /testbed/fill")
    assert result.disk_full and result.exit_code != 0 and not result.oom_killed
    assert not sandbox.run("rm /testbed/fill; echo hi > x").disk_full


def test_every_place_that_can_be_written_has_an_end(sandbox: Sandbox) -> None:
    for directory in ("/tmp", "/var/tmp", "/dev/shm", "/dev", "/root", "/usr/local"):
        result = sandbox.run(f"head -c 600000000 /dev/zero > {directory}/fill; s=$?; rm -f {directory}/fill; exit $s")
        assert result.exit_code != 0, directory
    assert sandbox.run("echo on").output == "on\n"


@pytest.mark.parametrize("where", ["/dev/shm", "/testbed"])
def test_more_files_than_there_may_be_are_a_full_disk(open_sandbox: Callable[..., Sandbox], where: str) -> None:
    sandbox = open_sandbox(limits=Limits(memory=512 * MIB, disk=64 * MIB, inodes=5000))
    if where == "/testbed" and not sandbox._launcher.facts["tmpfs_upper"]:
        pytest.skip("this upper is on disk, where the sandbox ends by it: test_endings.py")
    result = sandbox.run(f"mkdir {where}/many; cd {where}/many; touch $(seq 6000)")
    assert result.disk_full and result.exit_code != 0 and not result.oom_killed
    assert not sandbox.run(f"rm -rf {where}/many; echo hi > x").disk_full


def test_a_full_dev_shm_or_private_tmp_is_told(open_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = open_sandbox(private_tmp=True)
    for directory in ("/dev/shm", "/tmp", "/run"):
        fill = f"for i in $(seq 20); do head -c 30000000 /dev/zero > {directory}/fill$i || exit 1; done"
        result = sandbox.run(fill)
        assert result.disk_full and not result.oom_killed and result.exit_code == 1, directory
        assert not sandbox.run(f"rm {directory}/fill*").disk_full


@needs("root", "cgroup")
def test_everything_that_is_memory_is_counted(open_sandbox: Callable[..., Sandbox]) -> None:
    """Files of tmpfs, /dev/shm, memfds and what is in pipes: together more than the limit, each below it."""
    sandbox = open_sandbox(limits=Limits(memory=128 * MIB, disk=48 * MIB, processes=100))
    sandbox.run("head -c 45M /dev/zero > /root/fill; head -c 35M /dev/zero > /dev/shm/fill")
    memfds = "import os\nfor n in range(100): os.write(os.memfd_create(str(n)), bytes(1 << 20))"
    result = sandbox.run(["python3", "-c", memfds])
    assert result.oom_killed and result.exit_code == 137
    pipes = (
        "import fcntl, os\nfor n in range(100):\n"
        " r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 20); os.write(w, bytes(1 << 20))"  # F_SETPIPE_SZ
    )
    assert sandbox.run(["python3", "-c", pipes]).exit_code != 0
    assert sandbox.run("ls -s /root/fill | cut -d' ' -f1").output == "46080\n"
    assert sandbox.run("echo on").output == "on\n"


@needs("root", "cgroup")
def test_a_kill_for_memory_between_two_commands_is_neithers(sandbox: Sandbox) -> None:
    assert not sandbox.run("(sleep 0.5; python3 -c 'a = bytearray(700 << 20)') & true").oom_killed
    time.sleep(seconds(3))
    assert not sandbox.run("true").oom_killed


@needs("root", "cgroup")
def test_the_weight_of_a_sandbox_is_in_force(open_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = open_sandbox(limits=Limits(cpu_weight=300))
    if not sandbox._launcher.facts["cpu_cgroup"]:
        pytest.skip("no cpu controller")
    paths = {}
    for line in Path(f"/proc/{sandbox.pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    v2 = Path("/sys/fs/cgroup" + paths[""], "cpu.weight")
    if v2.exists():
        assert v2.read_text() == "300\n"
    else:
        assert Path("/sys/fs/cgroup/cpu" + paths["cpu"], "cpu.shares").read_text() == "3072\n"


@needs("root", "cgroup")
def test_a_process_killed_for_memory_is_told(sandbox: Sandbox) -> None:
    result = sandbox.run(["python3", "-c", "a = bytearray(700 << 20)"])
    assert result.oom_killed and result.exit_code == 137
    assert not sandbox.run("true").oom_killed
    shell = sandbox.shell()
    assert shell.run("python3 -c 'a = bytearray(700 << 20)'").oom_killed
    assert shell.run("echo on").output == "on\n"


def test_more_memory_than_the_limit_cannot_be_had(sandbox: Sandbox) -> None:
    assert sandbox.run(["python3", "-c", "a = bytearray(700 << 20)"]).exit_code != 0


def test_a_fork_bomb_ends_at_the_process_limit(sandbox: Sandbox) -> None:
    result = sandbox.run(":(){ :|:& }; : 2>/dev/null; sleep 1; echo end", timeout=seconds(20))
    assert "end" in result.output or result.exit_code != 0
    sandbox.freeze()
    assert sandbox.run("echo on").output == "on\n"


def test_open_files_and_core_size_are_limited(sandbox: Sandbox, open_sandbox: Callable[..., Sandbox]) -> None:
    assert sandbox.run("ulimit -c; ulimit -Hc").output == "0\n0\n"
    dumping = open_sandbox(limits=Limits(core=MIB))
    assert dumping.run("ulimit -c; ulimit -Hc").output == "1024\n1024\n"
    assert 0 < int(sandbox.run("ulimit -Hn").output) <= sandbox.spec.limits.open_files


@pytest.mark.parametrize("path", ["/proc/1/environ", "/proc/1/mem", "/proc/1/maps", "/proc/1/fd", "/proc/1/cwd/"])
def test_init_cannot_be_looked_into(sandbox: Sandbox, path: str) -> None:
    assert sandbox.run(f"ls {path} && cat {path}").exit_code != 0


def test_a_commands_score_for_memory_is_raised_and_never_lowered(layer: Path) -> None:
    """In a pod the machine's own score may be higher than ours, and lowering it is forbidden there."""
    script = (
        "import sys; from pathlib import Path; from tests.sandbox.conftest import base_binds\n"
        "from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec\n"
        "open('/proc/self/oom_score_adj', 'w').write(sys.argv[2])\n"
        "layer = Path(sys.argv[1])\n"
        "with Sandbox(SandboxSpec((layer,), base_binds(), scratch=layer.parent / 'scratch')) as sandbox:\n"
        "    print(sandbox.run('cat /proc/self/oom_score_adj').output)"
    )
    for own, wanted in (("100", "500"), ("900", "900")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(layer), own], capture_output=True, text=True, timeout=seconds(60),
            cwd=Path(__file__).resolve().parents[2],
        )
        assert done.stdout.strip() == wanted, done.stderr
