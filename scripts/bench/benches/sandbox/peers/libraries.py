"""Peers that are Python packages, each in a virtual environment of its own, driven over a pipe (driver.py takes the
time there, in the same process that uses the package, as it is taken for ours)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benches.contender import Absent, Contender, Ground, Seat

_DRIVER = Path(__file__).with_name("driver.py")
# The first that starts. Nitrobox's wheels ask for 3.12.
_PYTHONS = ("python3.12", "python3.13", "python3.14", "python3.11")


def installed(peers: Path, package: str) -> bool:
    python = peers / package / "bin/python"
    with contextlib.suppress(OSError):
        return subprocess.run([python, "-c", f"import {package}"], capture_output=True, timeout=60).returncode == 0
    return False


def install(peers: Path, package: str) -> str:
    """Make the package's environment; why not, or ""."""
    reason = "no interpreter"
    found = [shutil.which(name) for name in _PYTHONS]
    prefixes = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found += [str(p) for name in ("3.12", "3.13") for p in sorted(prefixes.glob(f"{name}.*/bin/python3"), reverse=True)]
    for python in [sys.executable, *(p for p in found if p)]:
        place = peers / package
        shutil.rmtree(place, ignore_errors=True)
        made = subprocess.run([python, "-m", "venv", place], capture_output=True, text=True, timeout=120, check=False)
        if made.returncode:
            continue
        done = subprocess.run(
            [place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package],
            capture_output=True, text=True, timeout=300, check=False,
        )
        if done.returncode == 0:
            return ""
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        shutil.rmtree(place, ignore_errors=True)
    return reason


class DriverSeat(Seat):
    def __init__(self, contender: _Library, key: int, root: int) -> None:
        self._contender, self._key, self._root = contender, key, root

    def _ask(self, verb: str) -> float:
        return float(self._contender.ask(verb, key=self._key)["seconds"])

    def echo(self) -> float:
        return self._ask("echo")

    def true(self) -> float:
        return self._ask("true")

    def reset(self) -> float:
        return self._ask("reset")

    def close(self) -> float:
        return self._ask("close")

    def roots(self) -> list[int]:
        return [self._root] if self._root else []


class _Library(Contender):
    package = ""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def start(self, ground: Ground) -> None:
        if os.geteuid() != 0:
            raise Absent("measured as root only")
        python = ground.peers / self.package / "bin/python"
        if not python.exists():
            raise Absent("not installed (`--install-peers`)")
        self._place = ground.work / self.package
        self._place.mkdir(exist_ok=True)
        self._log = open(ground.work / f"{self.package}.log", "w+b")
        self._process = subprocess.Popen(
            [python, _DRIVER, self.package, ground.root, self._place], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, env={**os.environ, "HOME": str(self._place), "TMPDIR": str(self._place)}, cwd="/",
        )
        try:
            self._version = str(self.ask("version")["version"])
            self.open()[0].close()
        except RuntimeError as error:
            self.stop()
            raise Absent(f"does not run here: {error}") from error

    def version(self) -> str:
        return self._version

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps({"verb": verb, **more}).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass
            line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1][:300] if said else "its process ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            if answer.get("absent"):
                raise Absent(answer["error"])
            raise RuntimeError(answer["error"])
        return answer

    def open(self) -> tuple[Seat, float]:
        answer = self.ask("open")
        return DriverSeat(self, answer["key"], answer["pid"]), float(answer["seconds"])

    def rate(self, count: int, width: int) -> float:
        return count / float(self.ask("rate", count=count, width=width)["seconds"])

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def state(self) -> list[Path]:
        return [self._place]


class Nitrobox(_Library):
    name = package = "nitrobox"


class Sandlock(_Library):
    """Landlock and a filter around a process; no namespaces and no root of its own to write to."""

    name = package = "sandlock"
