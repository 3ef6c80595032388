"""Starting, watching and killing processes, from init's side."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import pwd
import resource
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

from skyrl_minisandbox.sandbox import linux

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # what a shell exits with

_OOM_SCORE = 500
_HIGHEST_FD = (1 << 32) - 1


class OomScore:
    """Commands die for memory before init does: they inherit a score that is raised while they are forked.

    A command cannot write its own score before it execs without becoming dumpable, and then everybody inside could
    open its /proc/N/exe, which is the machine's interpreter, until it execs. path: init's own score, opened while init
    is dumpable itself.
    """

    def __init__(self, path: str) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._own = int(os.pread(self._fd, 16, 0))

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Never lowered: in a pod the machine's own may be above ours already, and going below it needs privilege."""
        if self._fd < 0 or self._own >= _OOM_SCORE:
            yield
            return
        os.pwrite(self._fd, str(_OOM_SCORE).encode(), 0)
        try:
            yield
        finally:
            os.pwrite(self._fd, str(self._own).encode(), 0)


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
        while self._tail_size[stream] > 2 * self._half:
            # Only whole chunks from the left, of either stream, so that the order stays.
            old_stream, old = self._tail.popleft()
            keep = self._half if len(old) > self._half and old_stream == stream else 0
            cut = len(old) - keep
            if keep:
                self._tail.appendleft((old_stream, old[-keep:]))
            self._tail_size[old_stream] -= cut
            self.dropped[old_stream] += cut

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


def spawn(
    argv: list[str], *, env: dict[str, str], cwd: str, user: str | None, fds: dict[int, int],
    rlimits: dict[int, int], score: OomScore,
) -> int:
    """Fork and exec in a session of its own; returns the pid.

    fds: target descriptor -> descriptor of ours. What fails after the fork is told the way a shell tells it: a line on
    standard error and exit code 126 or 127.
    """
    with score.raised():
        pid = os.fork()
        if pid == 0:
            _exec(argv, env, cwd, user, fds, rlimits)
        return pid


def _exec(
    argv: list[str], env: dict[str, str], cwd: str, user: str | None, fds: dict[int, int], rlimits: dict[int, int]
) -> NoReturn:
    try:
        os.setsid()
        for target, fd in fds.items():
            os.dup2(fd, target, inheritable=True)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        linux.close_range(max(max(fds), 2) + 1, _HIGHEST_FD)
        for limit, value in rlimits.items():
            resource.setrlimit(limit, (value, value))
        if user is not None:
            env = {**env, "HOME": _become(user)}
        try:
            os.chdir(cwd)
        except OSError as error:
            _complain(f"cannot start in {cwd}: {error.strerror}", NOT_EXECUTABLE)
        os.execvpe(argv[0], argv, env)
    except FileNotFoundError:
        _complain(f"{argv[0]}: command not found", NOT_FOUND)
    except (OSError, KeyError, ValueError) as error:
        _complain(f"{argv[0]}: {error}", NOT_EXECUTABLE)
    finally:
        os._exit(NOT_EXECUTABLE)


def _complain(text: str, code: int) -> None:
    os.write(2, f"{text}\n".encode(errors="replace"))
    os._exit(code)


def _become(user: str) -> str:
    """Be that user from here on; returns its home directory."""
    entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    if entry.pw_uid == os.getuid():
        return entry.pw_dir
    try:
        os.setgroups(os.getgrouplist(entry.pw_name, entry.pw_gid))
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ValueError(f"user {user} is not mapped: a plain user's sandbox has root alone") from None
        raise
    return entry.pw_dir


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


def _parents() -> dict[int, tuple[int, int]]:
    """pid -> (parent, session) of every process inside."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            table[int(name)] = (int(fields[1]), int(fields[3]))
    return table


def command_lines(spare: set[int], most: int) -> list[bytes]:
    """What runs inside, but for `spare` and zombies: command lines of at most 200 bytes."""
    found = []
    for pid in sorted(_parents()):
        if pid in spare or not _running(pid):
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


def descendants(root: int) -> set[int]:
    """The processes below `root`, itself left out, and those of its session that lost their parent."""
    table = _parents()
    found: set[int] = set()
    growing = True
    while growing:
        growing = False
        for pid, (parent, session) in table.items():
            if pid not in found and pid not in (1, root) and (
                parent == root or parent in found or session == root
            ):
                found.add(pid)
                growing = True
    return found


def kill_all(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def kill_tree(root: int, spare: frozenset[int] = frozenset(), *, itself: bool = True) -> None:
    """Kill `root` and what it started, until nothing new appears. `spare` and what is below it live on.

    A process that left both the tree and the session (a daemon) is not found; it ends with the sandbox. Without a
    /proc only the process group can be told: `root` goes too, whatever `itself` says.
    """
    if not os.path.exists("/proc/self"):
        try:
            os.killpg(root, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return
    for _ in range(100):
        spared = set(spare)
        for pid in spare:
            spared |= descendants(pid)
        found = descendants(root) - spared
        if itself:
            found.add(root)
        alive = {pid for pid in found if _running(pid)}
        if not alive:
            return
        kill_all(alive)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
