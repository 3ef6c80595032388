"""Uppers on disk go with their sandbox, or else with the next one that is made."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec, scratch

OWNER = """
import sys, time
from pathlib import Path
from tests.sandbox.conftest import base_binds
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
spec = SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[2]), on_disk=True)
sandbox = Sandbox(spec)
sandbox.run("mkdir -p /opt/a; echo written > /opt/a/b")
print("made", flush=True)
time.sleep(600)
"""


def test_uppers_of_a_killed_owner_are_swept_and_those_of_living_ones_are_not(
    spec: SandboxSpec, layer: Path, tmp_path: Path
) -> None:
    owners = []
    for _ in range(2):
        owners.append(
            subprocess.Popen(
                [sys.executable, "-c", OWNER, str(layer), str(tmp_path)], stdout=subprocess.PIPE, text=True,
                cwd=Path(__file__).resolve().parents[2],
            )
        )
    killed, living = owners
    try:
        for owner in owners:
            assert owner.stdout is not None and owner.stdout.readline() == "made\n"
        assert len(os.listdir(tmp_path)) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (tmp_path / "something-else").mkdir()
        with Sandbox(dataclasses.replace(spec, scratch=tmp_path, on_disk=True)):
            names = [name for name in os.listdir(tmp_path) if name != "something-else"]
            assert sorted(f"-{pid}-" in name for name in names for pid in (living.pid, os.getpid())) == [
                False, False, True, True,
            ], names
        assert len(os.listdir(tmp_path)) == 2
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
            assert owner.stdout is not None
            owner.stdout.close()


def test_what_another_boot_left_is_swept_and_what_another_container_uses_is_not(tmp_path: Path) -> None:
    boot, namespace, pid, start, random = scratch.place(tmp_path).name.removeprefix("upper-").split("-")
    dead = [f"{boot[::-1]}0"[:8], namespace, pid, start, random], [boot, namespace, pid, "1", random]
    alive = [boot, "1", "1", "1", random], [boot, namespace, pid, start, random]
    for fields in (*dead, *alive):
        (tmp_path / ("upper-" + "-".join(fields)) / "upper").mkdir(parents=True)
    assert scratch.sweep(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == sorted("upper-" + "-".join(fields) for fields in alive)


def test_an_upper_deeper_than_any_path_goes_with_its_sandbox(spec: SandboxSpec, tmp_path: Path) -> None:
    with Sandbox(dataclasses.replace(spec, scratch=tmp_path, on_disk=True)) as sandbox:
        deep = "import os\nfor _ in range(3000):\n os.mkdir('d'); os.chdir('d')\nopen('f', 'w'); os.chmod('.', 0)"
        assert sandbox.run(["python3", "-c", deep]).exit_code == 0
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []
