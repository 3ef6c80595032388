"""The net under the tests catches what it is there for."""

from __future__ import annotations

import subprocess
import sys

from tests.support import REPOSITORY


def under_the_net(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.orphans", "0.5", "bash", "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_exit_status_of_the_command_is_passed_on() -> None:
    assert under_the_net("exit 5").returncode == 5
    assert under_the_net("(true &); exit 0").returncode == 0


def test_an_orphan_is_named_and_ended() -> None:
    done = under_the_net("setsid sleep 61.5 </dev/null >/dev/null 2>&1 & exit 0")
    assert done.returncode == 1
    assert "sleep 61.5" in done.stderr
    assert not [p for p in all_commands() if "sleep 61.5" in p and "bash" not in p]


def all_commands() -> list[str]:
    from tests.machine import living_processes

    return [p.command for p in living_processes().values()]
