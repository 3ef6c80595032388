"""scripts/multinode with real Ray nodes. Slurm's own commands are stood in for: they run what they are given here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import REPOSITORY, seconds

SCRIPT = REPOSITORY / "scripts" / "multinode"
SRUN = 'while [[ "${1:-}" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = "printf '%s\\n' ${3//,/ }\n"
TRAINING = f"""#!{sys.executable}
import os, pathlib, sys, time
import ray
ray.init(logging_level="ERROR", log_to_driver=False)
place = pathlib.Path(os.environ["TOLD"])
alive = [node for node in ray.nodes() if node["Alive"]]
(place / "said").write_text(repr([len(alive), os.environ["RAY_AUTH_MODE"], sys.argv[1:]]))
(place / "said").rename(place / "told")
if "wait" in sys.argv:
    try:
        import signal
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        time.sleep(300)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(7)
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job of Slurm with two nodes, both this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("minisandbox", TRAINING)):
        (commands / name).write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray:
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))},
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "first,second",
            "RAY_DIRECTORY": ray,
            "TOLD": str(tmp_path),
        }


def rays(directory: str) -> list[str]:
    """Processes of the Ray whose files are there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if directory in command and "multinode" not in command:
            found.append(command[:120])
    return found


@pytest.mark.night
def test_ray_is_on_every_node_before_the_training_starts_and_gone_after_it(
    job: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", str(SCRIPT), "experiment=x", "out='a b'"]
    done = subprocess.run(command, env=job, capture_output=True, text=True, timeout=seconds(400))
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "told").read_text() == "[2, 'token', ['train', 'experiment=x', \"out='a b'\"]]"
    assert rays(job["RAY_DIRECTORY"]) == []


@pytest.mark.night
def test_slurm_s_signal_ends_the_training_in_order_and_then_ray(job: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(["bash", str(SCRIPT), "wait"], env=job, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + seconds(300)
        while not (tmp_path / "told").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=seconds(120))[1]
    assert process.returncode == 130, said
    assert rays(job["RAY_DIRECTORY"]) == []


@pytest.mark.night
def test_a_node_that_does_not_join_is_told(job: dict[str, str]) -> None:
    job |= {"SLURM_JOB_NODELIST": "first", "START_SECONDS": "1"}
    srun = "#!/bin/bash\n[[ \"$*\" == *hostname* ]] && echo 192.0.2.1 || sleep 60\n"
    (Path(job["TOLD"]) / "bin" / "srun").write_text(srun)
    done = subprocess.run(["bash", str(SCRIPT)], env=job, capture_output=True, text=True, timeout=seconds(120))
    assert done.returncode == 3 and "0 of 1 nodes joined within 1 s" in done.stderr


@pytest.mark.parametrize(
    "missing,code,said", [("srun", 3, "there is no `srun` on PATH"), ("SLURM_JOB_NODELIST", 2, "this is no Slurm job")]
)
def test_elsewhere_than_on_slurm_it_says_what_to_do(
    job: dict[str, str], tmp_path: Path, missing: str, code: int, said: str
) -> None:
    (tmp_path / "bin" / missing).unlink(missing_ok=True)
    job.pop(missing, None)
    done = subprocess.run(["bash", str(SCRIPT)], env=job, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said in done.stderr and "hint: " in done.stderr
