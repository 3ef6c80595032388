"""Watching and killing processes, and keeping what they say, from init's side."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from skyrl_minisandbox.sandbox import linux

_TICKS = os.sysconf("SC_CLK_TCK")
_ROUNDS = 5  # of looking for processes that are not stopped yet; more are a fork bomb's


class Capture:
    """Output of one command in order of arrival: the first half of the limit and the last half, per stream."""

    def __init__(self, limit: int) -> None:
        self._half = max(limit // 2, 1)
        self._head: list[tuple[int, bytearray]] = []
        self._tail: collections.deque[tuple[int, bytearray]] = collections.deque()
        self._head_size = {1: 0, 2: 0}
        self._tail_size = {1: 0, 2: 0}
        self.dropped = {1: 0, 2: 0}

    def add(self, stream: int, data: bytes) -> None:
        room = self._half - self._head_size[stream]
        if room > 0:
            head, data = data[:room], data[room:]
            self._head_size[stream] += len(head)
            _append(self._head, stream, head)
        if data:
            self._tail_size[stream] += len(data)
            _append(self._tail, stream, data)
            self._trim(stream)

    def _trim(self, stream: int) -> None:
        """From the left, of either stream, so that the order stays."""
        while (beyond := self._tail_size[stream] - self._half) > 0:
            of, old = self._tail[0]
            cut = min(beyond, len(old)) if of == stream else len(old)
            del old[:cut]
            if not old:
                self._tail.popleft()
            self._tail_size[of] -= cut
            self.dropped[of] += cut

    def chunks(self) -> list[tuple[int, bytes]]:
        """(stream, bytes) in order, a marker where something was cut."""
        result = [(stream, bytes(data)) for stream, data in self._head]
        for stream in (1, 2):
            if self.dropped[stream]:
                marker = f"\n[... {self.dropped[stream]} bytes of output were cut here ...]\n"
                result.append((stream, marker.encode()))
        return result + [(stream, bytes(data)) for stream, data in self._tail]


def _append(chunks: Any, stream: int, data: bytes) -> None:
    if chunks and chunks[-1][0] == stream and len(chunks[-1][1]) < 1 << 16:
        chunks[-1][1].extend(data)
    else:
        chunks.append((stream, bytearray(data)))


def ended_children() -> Iterator[tuple[int, int]]:
    """Reap every child that has ended: (pid, wait status). Does not wait."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def start_time(pid: int, proc: str = "/proc") -> str:
    """Field 22 of /proc/PID/stat: with the pid it names a process once. "" for one that has ended, or never was."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


class _Process(NamedTuple):
    """A line of the table: fields 3, 4, 6 and 22 of /proc/PID/stat."""

    alive: bool
    stopped: bool
    parent: int
    session: int
    start: int  # clock ticks since the machine's


def _table() -> dict[int, _Process]:
    """Every process inside but init."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            state = fields[0]
            table[int(name)] = _Process(
                state not in (b"Z", b"X"), state == b"T", int(fields[1]), int(fields[3]), int(fields[19])
            )
    return table


def command_lines(spare: set[int], most: int) -> list[bytes]:
    """What runs inside, but for `spare` and zombies: command lines of at most 200 bytes."""
    found = []
    for pid, process in sorted(_table().items()):
        if pid in spare or not process.alive:
            continue
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = file.read(200).rstrip(b"\0").replace(b"\0", b" ")
        except OSError:
            continue
        found.append(line or b"?")
        if len(found) == most:
            break
    return found


def moment() -> tuple[int, int]:
    """Now, as processes have it: (clock ticks since the machine's start, the last process number that was given)."""
    try:
        last = int(linux.read_small("/proc/loadavg").split()[-1])
    except OSError:
        last = 0
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS), last


def belonging(root: int, since: tuple[int, int] | None, others: frozenset[int]) -> set[int]:
    """The living processes that a command started, `root` itself left out. See `kill_command`."""
    table = _table()
    if root not in table:
        return set()
    since = since or (table[root].start, root)

    def is_new(pid: int) -> bool:
        return (table[pid].start, pid) > since

    old = {process.session for pid, process in table.items() if pid != root and not is_new(pid)} | others
    known: dict[int, bool] = {root: True, **dict.fromkeys(others - {root}, False)}

    def is_ours(pid: int) -> bool:
        chain = []
        while pid not in known:
            chain.append(pid)
            parent, session = table[pid].parent, table[pid].session
            if not is_new(pid):
                known[pid] = False
            elif parent not in table and parent != root:  # an orphan, which has become init's
                known[pid] = session == root or session not in old
            elif parent in chain:  # a number was given anew while the table was read
                known[pid] = True
            else:
                pid = parent
        for child in chain:
            known.setdefault(child, known[pid])
        return known[pid]

    return {pid for pid, process in table.items() if pid != root and process.alive and is_ours(pid)}


def kill_others() -> bool:
    """Kill every process inside but ourselves; whether there was any."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_all(pids: Iterable[int], sign: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)


def kill_command(root: int, since: tuple[int, int] | None, others: frozenset[int], *, itself: bool = True) -> None:
    """Kill what a command started since a `moment`, daemons too, and `root` if told so. since: None for root's start.

    others: roots of other trees (shells), which live on with what is below them, as does everything that was there
    before. One command runs at a time, so a newer process belongs to it, unless its living ancestors lead to an older
    one, or, as an orphan, it is in an older one's session. Only a daemon that a daemon of *before* makes meanwhile, in
    a session of its own, is taken for the command's.

    A subreaper (PR_SET_CHILD_SUBREAPER on `root`) would tell orphans apart without that exception, and was not taken:
    what runs inside would see it. A daemon's parent would not be 1, which programs ask for to see that theirs has died,
    and ended daemons would stay zombies, for which `kill -0` still finds a process, as no test runner reaps strangers.

    First everything is stopped, and what was not forked yet cannot be; then it is killed: a fork bomb would fill each
    place that a killed process leaves. Where new ones keep coming, all inside is stopped at once, and what is not the
    command's continued: not always so, because whoever has a terminal in there would be told of stopped jobs. Without a
    /proc only the process group can be told: `root` goes too, whatever `itself` says.
    """
    if not os.path.exists("/proc/self"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(root, signal.SIGKILL)
        return
    kill_all({root}, signal.SIGSTOP)
    halted: set[int] | None = None  # what was stopped before all was
    stopped: set[int] = set()
    for _ in range(_ROUNDS):
        running = belonging(root, since, others) - stopped
        if not running:
            break
        kill_all(running, signal.SIGSTOP)
        stopped |= running
    else:
        halted = {pid for pid, process in _table().items() if process.stopped}
        kill_all({-1}, signal.SIGSTOP)  # one pass of the kernel's, which no fork escapes
        stopped |= belonging(root, since, others)
    kill_all(stopped)
    if halted is not None:
        kill_all(set(_table()) - stopped - halted - {root}, signal.SIGCONT)
    kill_all({root}, signal.SIGKILL if itself else signal.SIGCONT)
