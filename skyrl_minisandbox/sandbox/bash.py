"""The persistent shell, from init's side: a non-interactive bash.

Each command goes in by file; it has ended when a random nonce with exit code and working directory comes out of a pipe
that the command itself does not hold; its output goes to a FIFO of its own, so that what an earlier background job
writes does not get into a later result. After each command the exports and functions are written down, and a shell
that ended (`exit`, `exec`, `set -e`, a kill) is started anew from them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat

from skyrl_minisandbox.sandbox import processes
from skyrl_minisandbox.sandbox.mounts import PRIVATE
from skyrl_minisandbox.sandbox.spawn import NotStarted, Spawner

_CONTROL = 19  # the descriptor that bash tells the end on; closed while a command runs
_BELOW_RTMAX = 5  # a signal that nobody uses makes bash leave a command that took too long
_ATTEMPTS = 5  # rounds of killing a command's processes before the shell itself is killed


class Bash:
    """One shell. init feeds it descriptors' events; it holds at most one running command."""

    def __init__(
        self, key: str, env: dict[str, str], cwd: str, user: str | None, spawner: Spawner
    ) -> None:
        self.key = key
        self.env = env
        self.cwd = cwd
        self.user = user
        self.spawner = spawner
        self.pid = 0
        self.control = -1
        self._input = -1
        self._nonce = b""
        self._told = b""
        self._output = ""
        self._next, self._next_name = -1, ""  # where the output of the next command comes from, made ahead
        self.exit_code = 0
        self._begun = (0, 0)
        self.started = 0
        self.restored = False  # its state file was laid there before its first start
        self.replaced = False  # nobody holds the control pipe: what runs under the pid is not bash any more

    def start(self) -> None:
        """Start bash; after the first time, with the exports, functions and directory of before. Raises as spawning."""
        if not self.started and not self.restored:
            # Written by the shell, whoever it runs as; another process that writes to it harms only this shell.
            os.close(self._new_file("state", 0o666))
        held: list[int] = []
        try:
            command_read, self._input = os.pipe2(os.O_CLOEXEC)
            held += [command_read, self._input]
            self.control, control_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            held += [self.control, control_write]
            os.set_blocking(self._input, False)  # others inside can fill it
            os.set_blocking(control_write, True)
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            held.append(null)
            cwd = self.cwd if os.path.isdir(self.cwd) else "/"
            self.pid = self.spawner.spawn(
                ["bash", "--noprofile", "--norc"], env=self.env, cwd=cwd, user=self.user,
                fds={0: command_read, 1: null, 2: null, _CONTROL: control_write},
            )
        except (OSError, NotStarted):
            for fd in held:
                os.close(fd)
            self.control = self._input = -1
            raise
        for fd in (command_read, control_write, null):
            os.close(fd)
        if (self.started or self.restored) and os.path.exists(self._path("state")):
            self._send(f". {self._path('state')} </dev/null >/dev/null 2>&1\n")
        if self.started:
            self.exit_code = 0
        self.started += 1
        self.replaced = False

    def _path(self, name: str) -> str:
        return f"{PRIVATE}/{self.key}.{name}"

    def _new_file(self, name: str, mode: int) -> int:
        """A descriptor of a new file: what lies there now may be a link, or a FIFO, which would hold init."""
        path = self._path(name)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            os.rename(path, self._path(os.urandom(8).hex()))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        os.fchmod(fd, mode)
        return fd

    def _send(self, line: str) -> None:
        try:
            os.write(self._input, line.encode())
        except BrokenPipeError:
            pass  # bash has just ended: its exit is on the way

    def begin(self, command: str) -> int:
        """Hand over a command; returns the descriptor its output comes from.

        Raises `OSError`: `BlockingIOError` when bash does not take any more, as others filled its input.
        """
        if self._next >= 0 and not self._untouched():
            os.close(self._next)
            self._next = -1
        self._prepare()
        self._told = b""
        file, output = self._path("command"), self._next_name
        handle = self._new_file("command", 0o644)
        try:
            view = memoryview(f"{command}\n".encode("utf-8", "surrogateescape"))
            while view:
                view = view[os.write(handle, view) :]
        finally:
            os.close(handle)
        read, self._next, self._output = self._next, -1, output
        self._begun = processes.moment()
        restore = f"(exit {self.exit_code});" if self.exit_code else ""
        state = self._path("state")
        # Short, as bash reads its input byte by byte: 0.3 us each. What it says beside the command goes to /dev/null.
        line = (
            f"builtin trap 'builtin return 124' {signal.SIGRTMAX - _BELOW_RTMAX:d};"
            f"{restore}. {file} </dev/null >{output} 2>&1 {_CONTROL}>&-;__ms=$?;"
            f"{{ builtin export -p;builtin declare -f;}}>|{state};"
            f"builtin printf '%s %d %s\\0' {self._nonce.decode()} \"$__ms\" \"${{PWD-}}\">&{_CONTROL};"
            f"builtin unset __ms\n"
        )
        try:
            self._send(line)
        except OSError:
            os.close(read)
            os.unlink(output)
            raise
        return read

    def prepare(self) -> None:
        """Make what the next command's output comes through, while nobody waits; what fails is told by `begin`."""
        with contextlib.suppress(OSError):
            self._prepare()

    def _untouched(self) -> bool:
        """Whether what was made ahead is still what lies there: a command may have removed it."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.lstat(self._next_name), os.fstat(self._next))
        return False

    def _prepare(self) -> None:
        if self._next >= 0:
            return
        self._nonce = os.urandom(8).hex().encode()
        self._next_name = self._path(os.urandom(4).hex())  # not to be guessed: what lies there would be in the way
        os.mkfifo(self._next_name)
        os.chmod(self._next_name, 0o622)
        self._next = os.open(self._next_name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def opened(self) -> None:
        """The command's output is closed on our side or kept elsewhere: its name may go."""
        with contextlib.suppress(OSError):  # gone, or a directory by now
            os.unlink(self._output)

    def told(self) -> tuple[int, str] | None:
        """Read what the control pipe has: (exit code, working directory) when the command has ended.

        Raises `EOFError` when bash no longer holds the pipe.
        """
        try:
            data = os.read(self.control, 1 << 16)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        # Bounded: whoever inside finds the pipe can write to it, and harms only this shell.
        self._told = (self._told + data)[-(1 << 16) :]
        for part in self._told.split(b"\0")[:-1]:
            nonce, _, rest = part.partition(b" ")
            if nonce == self._nonce:
                code, _, cwd = rest.partition(b" ")
                self.exit_code = int(code) & 0xFF if code.isdigit() and len(code) <= 3 else 1
                if cwd.startswith(b"/"):  # PWD is the agent's to change
                    self.cwd = os.fsdecode(cwd)
                return self.exit_code, self.cwd
        return None

    def interrupt(self, attempt: int, others: frozenset[int]) -> None:
        """Kill what the running command started, and have bash leave its text, which else goes on with what comes next
        (a function's caller goes on until the next attempt); at last the shell itself."""
        itself = self.replaced or attempt >= _ATTEMPTS
        if not itself:
            # Its trap runs when what is waited for has ended. Where the command took the trap away, this ends bash.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGRTMAX - _BELOW_RTMAX)
        processes.kill_command(self.pid, self._begun, others, itself=itself)

    def end(self) -> None:
        """Forget a shell that ended."""
        for fd in (self.control, self._input):
            if fd >= 0:
                os.close(fd)
        self.control = self._input = -1
        self.pid = 0

    def saved(self, limit: int) -> bytes:
        """What it exports, as bash text; empty when there is more than `limit` bytes of it, or none."""
        # O_NOFOLLOW and O_NONBLOCK: it lies where everybody inside can have made something else of it.
        with contextlib.suppress(OSError):
            fd = os.open(self._path("state"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    text = file.read(limit + 1)
                    return text if len(text) <= limit else b""
        return b""

    def notice(self) -> str:
        return (
            "The shell ended and was started anew"
            f" in {self.cwd}, with the exported variables and functions of before."
        )
