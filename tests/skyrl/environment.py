"""A directory with SkyRL itself, beside the packages of this environment; made once and kept.

A plain `pip install skyrl` brings gigabytes of CUDA. The generator needs none of it: SkyRL without its
dependencies, the few light ones that it imports, and a stub of torch (`episodes.py`).

    python -m tests.skyrl.environment      makes it, prints where
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import REPOSITORY

VERSION = "0.4.0"
LIGHT = ("loguru", "cloudpathlib", "tqdm", "aiohttp", "orjson", "pybase64", "numpy")


def skyrl_directory(version: str = VERSION) -> Path:
    """For the end of sys.path. Raises `CalledProcessError` when the package index does not give it."""
    cache = Path(os.environ.get("MINISANDBOX_TEST_CACHE") or REPOSITORY / ".cache")
    path = cache / f"skyrl-{version}-py{sys.version_info.major}.{sys.version_info.minor}"
    if path.is_dir():
        return path
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    # 0.4.0 asks for 3.12; episodes.py mends what 3.11 lacks.
    _pip("--no-deps", "--ignore-requires-python", f"skyrl=={version}", target=aside)
    _pip(*LIGHT, target=aside)
    try:
        aside.rename(path)
    except OSError:  # another made it meanwhile
        shutil.rmtree(aside)
    return path


def _pip(*arguments: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(target), *arguments], check=True, timeout=900)


if __name__ == "__main__":
    print(skyrl_directory())
