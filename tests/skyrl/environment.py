"""Environments with SkyRL in them, made from the package index once and kept in `.cache` (or MINISANDBOX_TEST_CACHE).

A plain `pip install skyrl` brings gigabytes of CUDA, and no two versions go together. Two ways round both:

    skyrl_directory(version)  SkyRL without its dependencies and the few light ones that its generator imports, for the
                              end of sys.path; torch is stubbed (`episodes.py`). Seconds to make.
    trainer_python(version)   an interpreter with SkyRL's real trainer, torch for CPUs, transformers, Ray and this
                              checkout. All versions share one environment with the dependencies, and each adds only
                              itself. Minutes to make, 2 GB; a few seconds for the second version.

    scripts/skyrl VERSION COMMAND…              runs a command in the second kind, `python` being its own
    python -m tests.skyrl.environment VERSION   makes it, prints its interpreter

torch is what pip finds. Where that is the CUDA build, PIP_EXTRA_INDEX_URL may name an index with builds for CPUs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.support import REPOSITORY

VERSION = "0.4.0"
VERSIONS = ("0.3.0", "0.4.0")

LIGHT = ("loguru", "cloudpathlib", "tqdm", "aiohttp", "orjson", "pybase64", "numpy")

TRAINER = (
    # What both versions take; SkyRL 0.3.0 pins torch 2.11 and Ray 2.56 and runs with these as well.
    "torch==2.13.0",
    "ray[default]==2.57.0",
    "transformers==5.8.0",
    "hydra-core==1.3.2",
    "accelerate",
    "cloudpickle",  # SkyRL falls back to pickle, which its own registries cannot be sent with
    "datasets",
    "fastapi",
    "jaxtyping",
    "matplotlib",
    "peft",
    "polars",
    "pyarrow",
    "pytest>=8",
    "pytest-asyncio",
    "setproctitle",
    "tensorboard",
    "tensordict",
    "torchdata",
    "typing_extensions",
    "uvicorn",
    "vllm-router",
    *LIGHT,
)

_TYPED_DICT = "import typing, typing_extensions; typing.TypedDict = typing_extensions.TypedDict"
"""Before Python 3.12 pydantic refuses typing's own, which SkyRL uses in its models although 0.3.0 says `>=3.11`."""

_PYTHON = f"py{sys.version_info.major}.{sys.version_info.minor}"


def skyrl_directory(version: str = VERSION) -> Path:
    """For the end of sys.path. Raises `CalledProcessError` when the package index does not give it."""
    cache = _cache()
    path = cache / f"skyrl-{version}-{_PYTHON}"
    if path.is_dir():
        return path
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    # 0.4.0 asks for 3.12; episodes.py mends what 3.11 lacks.
    _pip(sys.executable, "--no-deps", "--ignore-requires-python", f"skyrl=={version}", target=aside)
    _pip(sys.executable, *LIGHT, target=aside)
    try:
        aside.rename(path)
    except OSError:  # another made it meanwhile
        shutil.rmtree(aside)
    return path


def trainer_python(version: str = VERSION) -> Path:
    """The interpreter of an environment with SkyRL's trainer. Raises `CalledProcessError` as above."""
    base = _venv(f"trainer-{_PYTHON}", [*TRAINER, *_our_dependencies()], lines=[])
    (packages,) = base.glob("lib/python3.*/site-packages")
    lines = [f"import site; site.addsitedir({str(packages)!r})", str(REPOSITORY)]
    if sys.version_info < (3, 12):
        lines.append(_TYPED_DICT)
    own = _venv(
        f"trainer-{version}-{_PYTHON}",
        ["--no-deps", "--ignore-requires-python", f"skyrl=={version}"],
        lines=lines,
    )
    return own / "bin" / "python"


def _our_dependencies() -> list[str]:
    """Ours, less what SkyRL pins itself."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        ours: list[str] = tomllib.load(file)["project"]["dependencies"]
    return [line for line in ours if line.split(">")[0] not in ("ray", "hydra-core")]


def _venv(name: str, install: list[str], *, lines: list[str]) -> Path:
    """A venv with these installed and these lines in a .pth, one process at a time.

    What is wanted beyond what there is gets added: somebody may be running in it.
    """
    path = _cache() / name
    wanted = hashlib.sha256("\n".join([sys.version, *install, "", *lines]).encode()).hexdigest()
    stamp = path / "complete"
    with _alone(path.with_name(f"{name}.lock")):
        if stamp.is_file() and stamp.read_text() == wanted:
            return path
        print(f"making {path} (once)", file=sys.stderr)
        if not stamp.is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(path)], check=True, timeout=300)
        (packages,) = path.glob("lib/python3.*/site-packages")
        (packages / "minisandbox-tests.pth").write_text("".join(f"{line}\n" for line in lines))
        _pip(str(path / "bin" / "python"), *install)
        stamp.write_text(wanted)
    return path


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cache() -> Path:
    path = Path(os.environ.get("MINISANDBOX_TEST_CACHE") or REPOSITORY / ".cache")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _pip(python: str, *arguments: str, target: Path | None = None) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    into = [] if target is None else ["--target", str(target)]
    done = subprocess.run([*command, *into, *arguments], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        done.check_returncode()


if __name__ == "__main__":
    print(trainer_python(*sys.argv[1:2]))
