"""Starting processes inside, from init's side.

posix_spawn does it without copying init's memory, which is most of what a short command costs. It cannot set limits or
users: limits are held by init itself and inherited, and another user's command is forked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import signal
from collections.abc import Iterator
from typing import NoReturn

from skyrl_minisandbox.sandbox import linux

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # what a shell exits with

_OOM_SCORE = 500
# init has them ignored or caught; what it starts shall not.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGUSR1)
_NO_MORE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class NotStarted(Exception):
    """There is no such program or directory, or it may not be run: a result, told as a shell tells it."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


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


class Spawner:
    """Starts what runs inside. rlimits: of each process. own_files: descriptors that init may need itself."""

    def __init__(self, rlimits: dict[int, int], score: OomScore, own_files: int) -> None:
        self._rlimits, self._score = rlimits, score
        self._held = rlimits[resource.RLIMIT_NOFILE] >= own_files
        if self._held:
            for limit, value in rlimits.items():
                resource.setrlimit(limit, (value, value))

    def spawn(
        self, argv: list[str], *, env: dict[str, str], cwd: str, user: str | None, fds: dict[int, int]
    ) -> int:
        """Start a program in a session of its own; returns the pid.

        fds: target descriptor -> descriptor of ours, ascending. Raises `OSError` when there can be no more processes,
        and `NotStarted`, or what is wrong with the program is told the same way by the process itself.
        """
        with self._score.raised():
            if self._held and user is None:
                return _spawn(argv, env, cwd, fds)
            pid = os.fork()
            if pid == 0:
                _exec(argv, env, cwd, user, fds, self._rlimits)
            return pid


def _spawn(argv: list[str], env: dict[str, str], cwd: str, fds: dict[int, int]) -> int:
    try:
        os.chdir(cwd)
    except OSError as error:
        raise NotStarted(f"cannot start in {cwd}: {error.strerror}", NOT_EXECUTABLE) from error
    same = [fd for target, fd in fds.items() if fd == target]
    try:
        for fd in same:
            os.set_inheritable(fd, True)  # dup2 onto itself changes nothing: exec would close it
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in fds.items() if fd != target]
        refused: OSError | None = None
        for path in _candidates(argv[0], env):
            try:
                return os.posix_spawn(
                    path, argv, env, file_actions=actions, setsid=True, setsigdef=_DEFAULT_SIGNALS
                )
            except OSError as error:
                if error.errno in _NO_MORE:
                    raise
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    refused = refused or error
        if refused is None:
            raise NotStarted(f"{argv[0]}: command not found", NOT_FOUND)
        raise NotStarted(f"{argv[0]}: {refused.strerror}", NOT_EXECUTABLE)
    except ValueError as error:  # a NUL in an argument
        raise NotStarted(f"{argv[0]}: {error}", NOT_EXECUTABLE) from error
    finally:
        for fd in same:
            os.set_inheritable(fd, False)
        os.chdir("/")


def _candidates(name: str, env: dict[str, str]) -> list[str]:
    """Where a program may be, as execvp looks for it, but without trying what is not there."""
    if "/" in name:
        return [name]
    paths = [os.path.join(directory, name) for directory in os.get_exec_path(env)]
    return [path for path in paths if os.access(path, os.F_OK)]


def _exec(
    argv: list[str], env: dict[str, str], cwd: str, user: str | None, fds: dict[int, int], rlimits: dict[int, int]
) -> NoReturn:
    try:
        os.setsid()
        for target, fd in fds.items():
            if fd == target:
                os.set_inheritable(fd, True)  # dup2 onto itself changes nothing: exec would close it
            else:
                os.dup2(fd, target, inheritable=True)
        for number in _DEFAULT_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        linux.close_range(max(max(fds), 2) + 1)
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


def _complain(text: str, code: int) -> NoReturn:
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


