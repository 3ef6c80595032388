"""Limits are told as results; the sandbox and the machine live on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Sandbox
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


def test_open_files_and_core_size_are_limited(sandbox: Sandbox) -> None:
    assert sandbox.run("ulimit -c; ulimit -Hc").output == "0\n0\n"
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
        "with Sandbox(SandboxSpec((Path(sys.argv[1]),), base_binds())) as sandbox:\n"
        "    print(sandbox.run('cat /proc/self/oom_score_adj').output)"
    )
    for own, wanted in (("100", "500"), ("900", "900")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(layer), own], capture_output=True, text=True, timeout=seconds(60),
            cwd=Path(__file__).resolve().parents[2],
        )
        assert done.stdout.strip() == wanted, done.stderr
