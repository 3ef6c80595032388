"""Peers that run an OCI bundle: crun and runc. The bundle's root is an overlay that we mount for them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benches.contender import Absent, Contender, Ground, Seat, Stopwatch
from benches.sandbox.ours import LIMITS
from benches.sandbox.peers.pipes import BASH, ENVIRONMENT, Overlay, PipeSeat


class _Runtime(Contender):
    program = ""
    # What to say about it, and what stands before its command line: the first way that works is measured.
    ways: tuple[tuple[str, tuple[str, ...]], ...] = (("", ()),)

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def start(self, ground: Ground) -> None:
        if shutil.which(self.program) is None:
            raise Absent("not installed")
        if os.geteuid() != 0:
            raise Absent("measured as root only")
        self._ground = ground
        self._place = ground.work / self.program
        self._place.mkdir(exist_ok=True)
        self._state = self._place / "state"
        subprocess.run([self.program, "spec"], cwd=self._place, check=True, capture_output=True, timeout=30)
        self._spec: dict[str, Any] = json.loads((self._place / "config.json").read_text())
        self._spec["process"].update(
            terminal=False, args=list(BASH), cwd="/", env=[f"{key}={value}" for key, value in ENVIRONMENT.items()]
        )
        self._spec["root"]["readonly"] = False
        self._spec["hostname"] = "sandbox"
        self._spec["linux"].setdefault("resources", {}).update(
            memory={"limit": LIMITS.memory}, pids={"limit": LIMITS.processes}
        )

        reasons = []
        for note, before in self.ways:
            self._base = [*before, self.program, "--root", str(self._state)]
            self._note = note
            try:
                self.open()[0].close()
                return
            except RuntimeError as error:
                reasons.append(str(error))
        raise Absent(f"does not run here: {reasons[0]}")

    def version(self) -> str:
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, timeout=30).stdout
        return said.split()[2] + self._note

    def open(self) -> tuple[Seat, float]:
        name = f"minisandbox-bench-{os.getpid()}-{next(self._numbers)}"
        bundle = self._place / name
        with Stopwatch() as watch:
            bundle.mkdir()
            overlay = Overlay(bundle / "fs", self._ground.root)
            (bundle / "config.json").write_text(json.dumps({
                **self._spec, "root": {**self._spec["root"], "path": str(overlay.merged)},
                "linux": {**self._spec["linux"], "cgroupsPath": f"/{name}"},
            }))

            def after() -> None:
                overlay.remove()
                shutil.rmtree(bundle)

            seat = PipeSeat(
                [*self._base, "run", "--bundle", str(bundle), name], inside=[*self._base, "exec", name],
                end=[*self._base, "kill", name, "KILL"], after=after,
            )
        return seat, watch.seconds

    def state(self) -> list[Path]:
        return [self._place]


class Crun(_Runtime):
    """It refuses a machine whose cgroup v2 has controllers beside v1's: there it runs where v2 is not mounted."""

    name = program = "crun"
    ways = (
        ("", ()),
        (" (v2 unmounted for it)",
         ("unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified && exec "$@"', "sh")),
    )


class Runc(_Runtime):
    name = program = "runc"
