"""Peers that are one command line: bubblewrap, and the way of the system that this project starts from."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from benches.contender import Absent, Contender, Ground, Seat, Stopwatch
from benches.sandbox.peers.pipes import BASH, PipeSeat


class Bubblewrap(Contender):
    """Every namespace, a tmpfs overlay as the root. Before its 0.11 it mounts no overlay: a shell does it then."""

    name = "bubblewrap"

    def start(self, ground: Ground) -> None:
        if shutil.which("bwrap") is None:
            raise Absent("not installed")
        said = subprocess.run(["bwrap", "--help"], capture_output=True, text=True, timeout=30, check=False)
        options = [
            "--unshare-all", "--die-with-parent", "--hostname", "sandbox", "--proc", "/proc", "--dev", "/dev",
            "--tmpfs", "/tmp", "--chdir", "/", *BASH,
        ]
        if "--tmp-overlay" in said.stdout + said.stderr:
            self._argv = ["bwrap", "--overlay-src", str(ground.root), "--tmp-overlay", "/", *options]
            return
        if os.geteuid() != 0:
            raise Absent("this version has no --tmp-overlay, and mounting one for it needs root")
        place = ground.work / "bubblewrap"
        place.mkdir(exist_ok=True)
        script = (
            f"mount -t tmpfs tmpfs {place} && mkdir {place}/upper {place}/work {place}/merged && mount -t overlay "
            f"-o lowerdir={ground.root},upperdir={place}/upper,workdir={place}/work,volatile overlay {place}/merged && "
            f"exec bwrap --bind {place}/merged / {shlex.join(options)}"
        )
        self._argv = ["unshare", "--mount", "sh", "-c", script]

    def version(self) -> str:
        return subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=30).stdout.split()[-1]

    def open(self) -> tuple[Seat, float]:
        with Stopwatch() as watch:
            seat = PipeSeat(self._argv)
        return seat, watch.seconds


class Reference(Contender):
    """SWE-MiniSandbox's way: a directory on disk, the archive of the environment unpacked into it, `unshare --mount`,
    bind mounts of the machine's directories, chroot."""

    name = "reference"

    def __init__(self, *, archive: bool = True) -> None:
        self._with_archive = archive
        self._numbers = itertools.count()
        if not archive:
            self.name = "reference without archive"

    def start(self, ground: Ground) -> None:
        if os.geteuid() != 0:
            raise Absent("needs root")
        if self._with_archive and ground.archive is None:
            raise Absent("no archive to unpack in a quick run")
        self._ground = ground
        self._place = ground.work / self.name.replace(" ", "-")
        self._place.mkdir(exist_ok=True)

    def open(self) -> tuple[Seat, float]:
        root = self._place / str(next(self._numbers))
        with Stopwatch() as watch:
            lines = [f"mkdir -p {root}"]
            for entry in sorted(self._ground.root.iterdir()):
                target = root / entry.name
                if entry.is_symlink():
                    lines.append(f"cp -P {entry} {target}")
                elif entry.is_dir() and entry.name not in ("dev", "proc", "sys", "tmp"):
                    lines.append(f"mkdir {target} && mount --bind {entry} {target}")
                    lines.append(f"mount -o remount,ro,bind {target}")
            for name in ("dev", "proc", "sys", "tmp"):
                lines.append(f"mkdir {root}/{name} && mount --bind /{name} {root}/{name}")
            if self._with_archive:
                lines.append(f"mkdir {root}/environment && tar -xzf {self._ground.archive} -C {root}/environment")
            lines.append(f"exec chroot {root} {shlex.join(BASH)}")
            seat = PipeSeat(["unshare", "--mount", "sh", "-c", " && ".join(lines)], after=lambda: shutil.rmtree(root))
        return seat, watch.seconds

    def state(self) -> list[Path]:
        return [self._place]
