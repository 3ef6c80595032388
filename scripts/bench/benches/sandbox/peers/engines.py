"""Peers that are container engines, each with a storage directory, and docker with a daemon, of our own."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benches.contender import Absent, Contender, Ground, Seat, Stopwatch
from benches.sandbox.ours import LIMITS
from benches.sandbox.peers.pipes import BASH, PipeSeat, quiet

_IMAGE = "minisandbox-bench:latest"
_DAEMON_PATIENCE = 40.0


class _Engine(Contender):
    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._base: list[str] = []
        self._options: list[str] = []
        self._cgroup = f"minisandbox-bench-{os.getpid()}-{self.name}"
        self._note = ""

    def _import(self, ground: Ground) -> None:
        tar = subprocess.Popen(["tar", "-C", ground.root, "-c", "."], stdout=subprocess.PIPE)
        done = subprocess.run(
            [*self._base, "import", "-", _IMAGE],
            stdin=tar.stdout, capture_output=True, text=True, timeout=300, check=False,
        )
        assert tar.stdout is not None
        tar.stdout.close()
        tar.wait()
        if done.returncode:
            raise Absent(f"the image could not be imported: {_last(done.stderr)}")

    def _try(self) -> None:
        """One sandbox, so that what does not work here is told before the table."""
        try:
            self.open()[0].close()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            self.stop()
            raise Absent(f"does not run here: {error}") from error

    def open(self) -> tuple[Seat, float]:
        name = f"minisandbox-bench-{os.getpid()}-{next(self._numbers)}"
        argv = [
            *self._base, "run", "--rm", "--interactive", "--network", "none", "--name", name, "--hostname", "sandbox",
            "--cgroup-parent", f"/{self._cgroup}", "--memory", str(LIMITS.memory),
            "--pids-limit", str(LIMITS.processes), *self._options, _IMAGE, *BASH,
        ]
        with Stopwatch() as watch:
            seat = PipeSeat(argv, inside=[*self._base, "exec", name])
        return seat, watch.seconds

    def version(self) -> str:
        said = subprocess.run([self._base[0], "--version"], capture_output=True, text=True, timeout=30).stdout
        return said.replace(",", "").split()[2] + self._note

    def state(self) -> list[Path]:
        return [self._place]

    _place: Path


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "no reason told"


class Podman(_Engine):
    name = "podman"

    def start(self, ground: Ground) -> None:
        if shutil.which("podman") is None:
            raise Absent("not installed")
        if os.geteuid() != 0:
            raise Absent("measured as root only")
        self._place = ground.work / "podman"
        self._run = Path(tempfile.mkdtemp(prefix="mspod-"))  # sockets below it: a short path
        base = [
            "podman", "--root", str(self._place), "--runroot", str(self._run), "--tmpdir", str(self._run / "tmp"),
            "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--storage-driver", "overlay",
        ]
        self._base = base
        try:
            self._import(ground)
        except Absent:
            self.stop()
            raise
        # Its limits on files and processes may be above what this process may set; ours are given instead.
        limits = ["--ulimit", f"nofile={LIMITS.open_files}", "--ulimit", f"nproc={LIMITS.processes}"]
        reasons = []
        for runtime in ("crun", "runc"):
            if shutil.which(runtime) is None:
                continue
            self._options = [*limits]
            self._base = [*base, "--runtime", runtime]
            self._note = f" ({runtime})"
            try:
                self.open()[0].close()
                return
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                reasons.append(f"{runtime}: {error}")
        self.stop()
        raise Absent(f"does not run here: {'; '.join(reasons) or 'no OCI runtime'}")

    def stop(self) -> None:
        for argv in (["rm", "--all", "--force", "--time", "0"], ["rmi", "--all", "--force"]):
            subprocess.run([*self._base, *argv], capture_output=True, timeout=120, check=False)
        subprocess.run(["umount", self._place / "overlay"], capture_output=True, timeout=30, check=False)
        shutil.rmtree(self._run, ignore_errors=True)


class Docker(_Engine):
    """With a daemon of its own, which ends with the benchmark."""

    name = "docker"

    def start(self, ground: Ground) -> None:
        client = next((p for p in ("/usr/bin/docker", shutil.which("docker")) if p and os.path.exists(p)), None)
        if client is None or shutil.which("dockerd") is None:
            raise Absent("not installed" if client is None else "a client, but no dockerd")
        if os.geteuid() != 0:
            raise Absent("a daemon needs root")
        self._place = ground.work / "docker"
        self._run = Path(tempfile.mkdtemp(prefix="msdock-"))
        self._daemon: subprocess.Popen[bytes] | None = None
        reason = ""
        for driver in ("overlay2", "vfs"):
            reason = self._start_daemon(client, driver)
            if not reason:
                break
        if reason:
            self.stop()
            raise Absent(f"dockerd does not start here: {reason}")
        try:
            self._import(ground)
        except Absent:
            self.stop()
            raise
        self._try()

    def _start_daemon(self, client: str, driver: str) -> str:
        """Why it did not start, or ""."""
        socket = f"unix://{self._run}/docker.sock"
        self._base = [client, "--host", socket]
        log = self._run / "log"
        with open(log, "wb") as output:
            self._daemon = subprocess.Popen(
                [
                    "dockerd", "--host", socket, "--data-root", self._place, "--exec-root", self._run / "exec",
                    "--pidfile", self._run / "pid", "--bridge", "none", "--iptables=false", "--ip6tables=false",
                    "--storage-driver", driver, "--userland-proxy=false",
                ],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )
        deadline = time.monotonic() + _DAEMON_PATIENCE
        while time.monotonic() < deadline and self._daemon.poll() is None:
            done = subprocess.run([*self._base, "version"], capture_output=True, timeout=30, check=False)
            if done.returncode == 0:
                return ""
            time.sleep(0.2)
        self._end_daemon()
        return _last(log.read_text(errors="replace"))

    def _end_daemon(self) -> None:
        if self._daemon is None:
            return
        self._daemon.terminate()
        try:
            self._daemon.wait(30)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        self._daemon = None

    def stop(self) -> None:
        if self._daemon is not None:
            try:
                left = quiet([*self._base, "ps", "--all", "--quiet"]).split()
                if left:
                    quiet([*self._base, "rm", "--force", *(name.decode() for name in left)])
            except (RuntimeError, subprocess.TimeoutExpired):
                pass
        self._end_daemon()
        shutil.rmtree(self._run, ignore_errors=True)
