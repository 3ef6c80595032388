"""A sandbox that is a program with a bash at the end of its pipes."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benches.contender import Seat, Stopwatch
from skyrl_minisandbox.sandbox import linux

BASH = ("bash", "--noprofile", "--norc")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TERM": "dumb"}
_TOKEN = b"peer-is-here\n"
_PATIENCE = 120.0


class PipeSeat(Seat):
    """argv: the whole command line, ending in bash. inside: what starts a process in the living sandbox, if anything
    does. after: what is to be done when it has ended, timed with the end."""

    def __init__(
        self, argv: Sequence[str | Path], *, inside: Sequence[str | Path] | None = None,
        end: Sequence[str | Path] | None = None, after: Callable[[], None] | None = None,
    ) -> None:
        self._inside, self._end, self._after = inside, end, after
        self._process = subprocess.Popen(
            list(map(str, argv)), bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        try:
            self._answer(b"")
        except BaseException:
            self._process.kill()
            self._process.wait()
            if after is not None:
                after()
            raise

    def _answer(self, command: bytes) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(command + b"echo " + _TOKEN)
        except BrokenPipeError:
            pass  # told below, with what it says on standard error
        heard = b""
        deadline = time.monotonic() + _PATIENCE
        while not heard.endswith(_TOKEN):
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            part = os.read(self._process.stdout.fileno(), 4096) if ready else b""
            if not part:
                raise RuntimeError(self._complaint(heard))
            heard += part

    def _complaint(self, heard: bytes) -> str:
        self._process.kill()
        _, said = self._process.communicate(timeout=30)
        lines = (heard + said).decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it gave no answer"

    def echo(self) -> float:
        with Stopwatch() as watch:
            self._answer(b"")
        return watch.seconds

    def true(self) -> float:
        if self._inside is None:
            with Stopwatch() as watch:  # no way in but its shell
                self._answer(b"/bin/true; ")
            return watch.seconds
        with Stopwatch() as watch:
            quiet([*self._inside, "/bin/true"])
        return watch.seconds

    def close(self) -> float:
        with Stopwatch() as watch:
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream is not None and (self._end is None or stream is not self._process.stdin):
                    stream.close()
            if self._end is not None:
                with contextlib.suppress(RuntimeError):  # it may end by itself just now; below it is waited for
                    quiet(self._end)
                if self._process.stdin is not None:
                    self._process.stdin.close()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._after is not None:
                self._after()
        return watch.seconds

    def roots(self) -> list[int]:
        return [self._process.pid]


def quiet(argv: Sequence[str | Path], *, timeout: float = _PATIENCE) -> bytes:
    """Run to the end; its output. Raises `RuntimeError` with its last words."""
    done = subprocess.run(
        list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{argv[0]}: {lines[-1][:300] if lines else done.returncode}")
    return done.stdout


class Overlay:
    """A root to write to, for those who bring none of their own: an overlay on tmpfs, as ours has it."""

    def __init__(self, place: Path, lower: Path) -> None:
        self.place = place
        self.merged = place / "merged"
        place.mkdir(parents=True)
        linux.mount("tmpfs", str(place), "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=2g")
        for name in ("upper", "work", "merged"):
            (place / name).mkdir()
        options = f"lowerdir={lower},upperdir={place}/upper,workdir={place}/work,volatile"
        linux.mount("overlay", str(self.merged), "overlay", 0, options)

    def remove(self) -> None:
        linux.umount(str(self.merged))
        linux.umount(str(self.place))
        self.place.rmdir()
