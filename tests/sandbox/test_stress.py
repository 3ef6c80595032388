"""stress-ng inside: hundreds of programs that go for the kernel. The machine and a sandbox beside it do not notice."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests import footprint
from tests.sandbox.test_teardown import alive
from tests.support import needs, seconds

pytestmark = needs("stress-ng")

MIB = 1 << 20
# What the kernel says when something in it broke, not when it refused or killed something.
_BROKEN = re.compile(
    r"BUG|Oops|WARNING: |general protection|kernel panic|soft lockup|blocked for more than|self-detected stall|KASAN"
)


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the machine that is to live on."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def _broken() -> list[str] | None:
    """Lines of the kernel's log that tell of damage; None where it cannot be read."""
    done = subprocess.run(["dmesg", "--raw"], capture_output=True, text=True, errors="replace", check=False)
    return [line for line in done.stdout.splitlines() if _BROKEN.search(line)] if done.returncode == 0 else None


@pytest.mark.parametrize("kind", ["os", "vm", "filesystem"])
@pytest.mark.parametrize(
    ("whole", "each"), [pytest.param(15, 1, marks=pytest.mark.ci), pytest.param(60, 2, marks=pytest.mark.night)]
)
def test_the_machine_is_unharmed_by_stress(
    kind: str, whole: int, each: int, spec: SandboxSpec, launcher: LauncherClient, victim: subprocess.Popen[bytes]
) -> None:
    limits = dataclasses.replace(spec.limits, memory=768 * MIB, processes=300, disk=256 * MIB, inodes=50_000)
    with Sandbox(spec, launcher) as warm:
        warm.run("true")
    beside = Sandbox(spec, launcher)
    beside.shell().run("echo on")
    before, broken = footprint.resting(), _broken()
    machine = os.uname().nodename, os.sysconf("SC_NPROCESSORS_ONLN")
    sandbox = Sandbox(dataclasses.replace(spec, limits=limits), launcher)
    command = f"timeout {whole} stress-ng --class {kind} --sequential 1 -t {each} --temp-path /tmp -v --no-rand-seed"
    result = sandbox.run(command, cwd="/tmp", timeout=seconds(whole + 30))
    begun = dict.fromkeys(re.findall(r"\] ([a-z0-9-]+): started \[", result.output))
    print(f"{kind}, {whole} s: exit code {result.exit_code}; {len(begun)} begun: {' '.join(begun)}")
    assert len(begun) >= 3, result.output[-2000:]
    assert beside.shells[0].run("echo on", timeout=seconds(20)).output == "on\n"
    pid = sandbox.pid
    assert alive(pid)
    sandbox.close()
    assert not alive(pid)
    assert victim.poll() is None
    assert beside.shells[0].run("echo still", timeout=seconds(20)).output == "still\n"
    assert (os.uname().nodename, os.sysconf("SC_NPROCESSORS_ONLN")) == machine
    after = footprint.settled(before)
    print(after.table(before))
    assert after.more(before) == []
    # Old lines may have left the kernel's log; new ones must not be in it.
    assert set(_broken() or ()) <= set(broken or ())
    beside.close()
    with Sandbox(spec, launcher) as next_one:
        assert next_one.run("echo on").output == "on\n"
