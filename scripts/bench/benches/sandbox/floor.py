"""The floor as a contender: floor.c, compiled here, with a plan that is read off one of our own living sandboxes."""

from __future__ import annotations

import dataclasses
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benches.contender import Absent, Contender, Ground, Held, Seat
from benches.sandbox.ours import LIMITS, Ours, OurSeat
from skyrl_minisandbox.sandbox import linux, seccomp
from skyrl_minisandbox.sandbox.overlay import RANGE_BASE

SOURCE = Path(__file__).with_name("floor.c")
_FLAGS = {
    "ro": linux.MS_RDONLY, "nosuid": linux.MS_NOSUID, "nodev": linux.MS_NODEV, "noexec": linux.MS_NOEXEC,
}
_LINKS = (
    ("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"), ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"), ("/dev/ptmx", "pts/ptmx"),
)


@dataclasses.dataclass(frozen=True)
class Mounted:
    """A line of mountinfo."""

    root: str
    target: str
    flags: int
    kind: str
    options: str

    @classmethod
    def of(cls, pid: int) -> Iterator[Mounted]:
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            fields, (kind, _, options) = left.split(" "), right.split(" ", 2)
            flags = sum(_FLAGS.get(option, 0) for option in fields[5].split(","))
            yield cls(fields[3], fields[4], flags, kind, options)


def _mount_lines(pid: int) -> Iterator[str]:
    """What our sandbox has mounted, as the floor is to do it."""
    for mounted in Mounted.of(pid):
        if mounted.target == "/":
            continue
        if mounted.kind == "devtmpfs":
            yield f"bind\t{mounted.target}\t/dev{mounted.root}\t0\t"
        elif mounted.kind == "proc" and mounted.root != "/":
            yield f"read-only\t{mounted.target}\t\t{mounted.flags}\t"
        elif mounted.kind == "devpts":
            data = "newinstance,ptmxmode=0666,mode=620,gid=5"
            yield f"devpts\t{mounted.target}\t\t{mounted.flags}\t{data}"
        elif mounted.kind in ("tmpfs", "proc"):
            kept = [o for o in mounted.options.split(",") if o.startswith(("size=", "nr_inodes=", "mode="))]
            yield f"{mounted.kind}\t{mounted.target}\t\t{mounted.flags}\t{','.join(kept)}"
            if mounted.target == "/dev":
                yield from (f"link\t{path}\t{target}\t0\t" for path, target in _LINKS)
        else:
            raise Absent(f"our sandbox has a {mounted.kind} at {mounted.target}, which the floor does not know")


class _Cgroups:
    """Directories beside our launcher's, and what our sandbox has set in its own, found by comparing with a new one."""

    def __init__(self, pid: int) -> None:
        self.lines: list[str] = []
        name = f"minisandbox-floor-{os.getpid()}-{secrets.token_hex(3)}"
        self.made: list[Path] = []
        points = self._points()
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "minisandbox-" not in path:
                continue
            theirs = Path(points[controllers] + path)
            parent = theirs.parent.parent / name
            parent.mkdir()
            self.made.append(parent)
            number = len(self.made) - 1
            switched = theirs.parent / "cgroup.subtree_control"
            if switched.exists():
                words = " ".join(f"+{name}" for name in switched.read_text().split())
                (parent / "cgroup.subtree_control").write_text(words)
            self.lines.append(f"cgroup\t{parent}")
            fresh = parent / "fresh"
            fresh.mkdir()
            self.lines += [f"limit\t{number}\t{name}\t{value}" for name, value in self._set(theirs, fresh)]
            fresh.rmdir()

    @staticmethod
    def _points() -> dict[str, str]:
        found = {}
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            kind, _, options = right.split(" ", 2)
            if kind == "cgroup2":
                found[""] = left.split(" ")[4]
            elif kind == "cgroup":
                for name in options.split(","):
                    found[name] = left.split(" ")[4]
        return found

    @staticmethod
    def _set(theirs: Path, fresh: Path) -> Iterator[tuple[str, str]]:
        # In the order in which they can be written: v1 takes memory+swap only after memory.
        names = sorted((p.name for p in fresh.iterdir() if p.stat().st_mode & 0o200), key=lambda n: ("memsw" in n, n))
        for name in names:
            if not name.startswith(("memory.", "pids.", "cpu.", "io.")) or "usage" in name or "failcnt" in name:
                continue
            try:
                value = (theirs / name).read_text().strip()
                if value != (fresh / name).read_text().strip() and "\n" not in value:
                    yield name, value
            except OSError:
                continue

    def remove(self) -> None:
        for path in self.made:
            for child in path.iterdir():
                if child.is_dir():
                    child.rmdir()
            path.rmdir()


class FloorSeat(Seat):
    def __init__(self, floor: Floor) -> None:
        self._floor = floor

    def echo(self) -> float:
        return self._floor.ask("echo")[0]

    def true(self) -> float:
        return self._floor.ask("true")[0]

    def reset(self) -> float:
        """As far as system calls go, a reset is an end and a beginning."""
        return self._floor.ask("close")[0] + self._floor.ask("create")[0]

    def close(self) -> float:
        return self._floor.ask("close")[0]


class FloorHeld(Held):
    def __init__(self, floor: Floor, count: int) -> None:
        super().__init__([])
        self._floor = floor
        self._count = len(floor.ask(f"hold {count}")[1])

    def answer(self) -> int:
        self._floor.ask("answer")
        return self._count

    def release(self) -> None:
        self._floor.ask("drop")


class Floor(Contender):
    """One sandbox at a time, `rate`, and many held at once. Its owner is C as well."""

    def __init__(self, *, cgroup: bool = True) -> None:
        self.cgroup = cgroup
        self.name = "floor"
        self._cgroups: _Cgroups | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self, ground: Ground) -> None:
        if os.geteuid() != 0:
            raise Absent("needs root")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Absent("no C compiler")
        program = ground.work / "floor"
        if not program.exists():
            subprocess.run([compiler, "-O2", "-o", program, SOURCE], check=True, timeout=120)
        plan = ground.work / ("floor.plan" if self.cgroup else "floor-cgroup-off.plan")
        try:
            plan.write_text("\n".join(self._plan(ground)) + "\n")
        except BaseException:
            self.stop()
            raise
        self._process = subprocess.Popen([program, plan], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.open()[0].close()
        except RuntimeError:
            self.stop()
            raise

    def _plan(self, ground: Ground) -> Iterator[str]:
        filter_file = ground.work / "filter.bpf"
        filter_file.write_bytes(seccomp.build_filter(platform.machine(), single_id=False))
        ours = Ours(cgroup=self.cgroup)
        ours.start(ground)
        try:
            with ours.sandbox() as sandbox:
                OurSeat(sandbox).echo()
                status = Path(f"/proc/{sandbox.pid}/status").read_text()
                capabilities = next(line.split()[1] for line in status.splitlines() if line.startswith("CapBnd:"))
                yield f"layer\t{ground.root}"
                base = Path(f"/proc/{sandbox.pid}/uid_map").read_text().split()[1]
                yield f"base\t{base or RANGE_BASE}"
                yield f"disk\t{LIMITS.disk}"
                yield f"capabilities\t{capabilities}"
                yield f"filter\t{filter_file}"
                if self.cgroup:
                    self._cgroups = _Cgroups(sandbox.pid)
                    yield from self._cgroups.lines
                yield from _mount_lines(sandbox.pid)
        finally:
            ours.stop()

    def ask(self, line: str) -> tuple[float, list[int]]:
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if not answer:
            raise RuntimeError(f"the floor ended at `{line}` (its reason is on standard error)")
        return float(answer[0]), [int(pid) for pid in answer[1:]]

    def open(self) -> tuple[Seat, float]:
        return FloorSeat(self), self.ask("create")[0]

    def rate(self, count: int, width: int) -> float:
        return count / self.ask(f"rate {count} {width}")[0]

    def hold(self, count: int) -> Held:
        return FloorHeld(self, count)

    def stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._cgroups is not None:
            self._cgroups.remove()
            self._cgroups = None
