"""`uv run --isolated --with WHEEL …`, how SkyRL's users start everything: each Ray process has an environment of its
own then, made by Ray's hook from the command line, and gone with it. With the wheel and skyrl-gym only: `skyrl` would
bring CUDA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small import build_small_image, small_task
from tests.support import REPOSITORY, needs, seconds

pytestmark = [pytest.mark.night, needs("userns", "overlay", "git", "network", "build")]

RAY = "ray==2.57.0"
"""What SkyRL 0.4.0 pins."""

OWN = """\
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission

class Own(Scaffold):
    def run(self, task, sandbox, policy):
        command = policy.query([{"role": "user", "content": "echo 'echo right' > answer.sh"}])
        sandbox.run(command, timeout=20)
        return Submission(patch=None, trajectory=[])
"""


@pytest.fixture
def uv(tmp_path: Path) -> Path:
    """The directory of the program, from the package index."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "uv"), "uv"]
    subprocess.run(install, check=True, timeout=600)
    return tmp_path / "uv" / "bin"


@pytest.fixture
def ray_directory() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="tests-ray-", dir="/tmp")  # short: see own_ray.py
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_nodes_and_workers_find_their_python_and_package_under_uv(
    uv: Path, wheel: Path, tmp_path: Path, ray_directory: str
) -> None:
    build_small_image(tmp_path / "store", tmp_path / "cache")
    here = tmp_path / "here"
    here.mkdir()
    (here / "task.json").write_text(small_task().model_dump_json())
    (here / "own_scaffold.py").write_text(OWN)
    shutil.copy(REPOSITORY / "tests" / "training" / "uv_job.py", here)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{uv}:{os.environ['PATH']}",
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        "UV_COMPILE_BYTECODE": "1",
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": ray_directory,
        "RAY_USAGE_STATS_ENABLED": "0",
        "SSL_CERT_FILE": os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE", ""),
    }
    environment = {name: value for name, value in environment.items() if value}
    run = ["uv", "run", "--isolated", "--no-project", "--python", sys.executable, "--with", str(wheel), "--with", RAY]
    job = ["python", "uv_job.py", str(tmp_path / "store"), str(tmp_path / "cache")]
    done = subprocess.run(
        [*run, *job], cwd=here, env=environment, capture_output=True, text=True, timeout=seconds(900), check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["record"]["outcome"] == "resolved", found
    assert found["prefix"] != found["driver"], "Ray's hook gave the task an environment of its own"
    assert str(REPOSITORY) not in found["package"]
    assert len(found["workers"]) == 2
    for executable in found["workers"]:
        assert executable.startswith(str(tmp_path / "uv-cache")), "the workers are in the environment of their node"
    left = list((tmp_path / "cache" / "claims").iterdir())
    assert left == [], "and everything has ended in order"
