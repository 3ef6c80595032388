"""What init does once the room is set up: serve its owner's requests, one event at a time.

One loop over descriptors: the owner's socket, the output of commands, the shells' control pipes, and a wake-up for
ended children. Nothing that the inside controls can hold it: every descriptor is non-blocking, every wait has the
nearest deadline, and what is not read here is bounded there.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from typing import Any

from skyrl_minisandbox.sandbox import limits, processes, tree, wire
from skyrl_minisandbox.sandbox.answers import Answers
from skyrl_minisandbox.sandbox.bash import Bash
from skyrl_minisandbox.sandbox.spawn import NOT_EXECUTABLE, NotStarted, OomScore, Spawner
from skyrl_minisandbox.sandbox.underway import Command, Unpacking, Writing, read_file
from skyrl_minisandbox.sandbox.wire import Answer, Ask

# How long a killed command may take to end before its result is given without it, seconds.
_GRACE = 5.0
# The same for every process at once, on a machine that many sandboxes load; below what the owner waits for an answer.
_FREEZE = 20.0
_KILL_PAUSE = 0.05
_LONGEST_POLL = 1e6  # an epoll takes its milliseconds as an int
_STDIN_WINDOW = 1 << 20
_OWN_FILES = 256
# What a pipe can hold at a command's end (1 MiB at most without privilege) is 16 chunks; what a background
# process goes on writing is not the command's.
_LAST_ROUNDS = 17


class Server:
    """The loop. `request` is the launcher's, as init got it."""

    def __init__(self, request: dict[str, Any], sock: socket.socket, score: OomScore) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._limits = request["limits"]
        self._places = ("/", "/dev", "/dev/shm", *(("/tmp", "/run") if request["private_tmp"] else ()))
        # A background process may hold both its pipes, whose other ends are init's.
        own_files = 2 * self._limits["processes"] + _OWN_FILES
        self._spawner = Spawner(limits.rlimits(request), score, own_files)
        self._reader = wire.FrameReader()
        self._answers = Answers(sock)
        self._poll = select.epoll()
        self._commands: dict[int, Command] = {}  # request id -> command
        self._by_output: dict[int, Command | None] = {}  # None: a shell's control pipe
        self._drains: set[int] = set()
        self._shells: dict[str, Bash] = {}
        self._writing: dict[int, Writing | Unpacking] = {}  # request id -> what DATA frames go into
        self._coming: dict[int, tuple[dict[str, Any], bytearray]] = {}  # long shell commands, in DATA frames
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

        signal.signal(signal.SIGCHLD, lambda *_: None)
        # From the launcher, when the owner interrupts: it is heard while a command is slow in taking its input too.
        signal.signal(signal.SIGUSR1, lambda *_: processes.kill_others())
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._poll.register(self._wake_read, select.EPOLLIN)
        self._events = select.EPOLLIN
        self._poll.register(self._sock.fileno(), self._events)

    def send_ready(self, lost: list[str]) -> None:
        """Tell that everything that was asked for is in force but what is named."""
        self._answers.send(Answer.READY, 0, ",".join(lost).encode())

    def serve(self) -> None:
        """Until the owner's end of the socket closes."""
        for shell in self._shells.values():  # one that was started at once
            shell.prepare()
        while True:
            for fd, events in self._poll.poll(self._wait()):
                if fd == self._sock.fileno():
                    if events & select.EPOLLOUT:
                        self._answers.go_on()
                    if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not self._receive():
                        return
                elif fd == self._wake_read:
                    self._reap()
                else:
                    self._event(fd)
            self._expire()
            self._throttle()

    # The owner's requests

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        for kind, request, payload in self._reader.feed(data):
            try:
                self._handle(kind, request, payload)
            except OSError as error:
                self._answers.error(request, error)
            except ValueError as error:  # a path with a NUL in it
                self._answers.error(request, OSError(errno.EINVAL, str(error)))
        return True

    def _handle(self, kind: int, request: int, payload: bytes) -> None:
        if kind == Ask.DATA:
            self._data(request, payload)
            return
        ask = json.loads(payload) if payload else {}
        if kind == Ask.RUN:
            self._run(request, ask)
        elif kind == Ask.SHELL and "size" in ask:
            self._coming[request] = (ask, bytearray())
        elif kind == Ask.SHELL:
            self._shell(request, ask)
        elif kind == Ask.READ:
            self._answers.stream(request, read_file(ask["path"], ask["limit"]))
        elif kind == Ask.GET:
            pieces = tree.pack(ask["path"], max_bytes=ask["max_bytes"], max_members=ask["max_members"])
            self._answers.stream(request, tree.gathered(pieces, wire.CHUNK))
        elif kind == Ask.WRITE:
            self._writing[request] = Writing(ask["path"], ask["mode"])
        elif kind == Ask.PUT:
            self._writing[request] = Unpacking(ask["path"])
        elif kind == Ask.HALT:
            self._halt(request)
        elif kind == Ask.FREEZE:
            self._freeze(request)

    def _run(self, request: int, ask: dict[str, Any]) -> None:
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for _ in (1, 2):
                read, write = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(read, False)
                ours.append(read)
                theirs.append(write)
            feed = -1
            if ask["input"]:
                stdin, feed = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(feed, False)
                ours.append(feed)
            else:
                stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            theirs.append(stdin)
            out_write, err_write = theirs[:2]
            pid = self._spawner.spawn(
                ask["argv"], env=ask["env"], cwd=ask["cwd"], user=ask["user"],
                fds={0: stdin, 1: out_write, 2: err_write},
            )
        except (OSError, NotStarted) as error:
            # What runs inside has used up processes or descriptors: a result, told as a shell would.
            for fd in ours:
                os.close(fd)
            self._refuse(request, "cannot fork", error)
            return
        finally:
            for fd in theirs:
                os.close(fd)
        out_read, err_read = ours[:2]
        command = Command(request, pid, ask["timeout"], ask["output"])
        self._commands[request] = command
        self._watch(command, out_read, 1)
        self._watch(command, err_read, 2)
        if feed >= 0:
            command.stdin = feed
            self._poll.register(feed, select.EPOLLOUT)
            self._by_output[feed] = command

    def _shell(self, request: int, ask: dict[str, Any]) -> None:
        key = ask["shell"]
        shell = self._shells.get(key)
        if shell is None:
            shell = self._shells[key] = Bash(
                key, ask["env"], ask["cwd"], ask["user"], self._spawner
            )
            shell.restored, shell.exit_code = ask.get("restored", False), ask.get("code", 0)
        try:
            if not shell.pid:
                self._start(shell)
            output = shell.begin(ask["command"])
        except (OSError, NotStarted) as error:
            if isinstance(error, BlockingIOError):
                # It takes no more commands: the next one finds a fresh shell.
                processes.kill_all({shell.pid})
                self._reap(wait=_KILL_PAUSE)
            self._refuse(request, "cannot run in the shell", error)
            return
        command = Command(request, shell.pid, ask["timeout"], self._limits["output"])
        command.shell = shell
        self._commands[request] = command
        self._watch(command, output, 1)

    def start_shell(self, ask: dict[str, Any]) -> None:
        """Start one before its first command comes: bash gets ready while that is on its way."""
        shell = self._shells[ask["shell"]] = Bash(
            ask["shell"], ask["env"], ask["cwd"], ask["user"], self._spawner
        )
        self._start(shell)

    def _start(self, shell: Bash) -> None:
        shell.start()
        self._poll.register(shell.control, select.EPOLLIN)
        self._by_output[shell.control] = None

    def _refuse(self, request: int, what: str, error: OSError | NotStarted) -> None:
        text, code = (str(error), error.code) if isinstance(error, NotStarted) else (
            f"{what}: {error.strerror}", NOT_EXECUTABLE)
        command = Command(request, 0, None, self._limits["output"])
        command.capture.add(2, f"{text}\n".encode(errors="replace"))
        self._commands[request] = command
        self._finish(command, code)

    def _watch(self, command: Command, fd: int, stream: int) -> None:
        """Poll an output, which does not block."""
        command.outputs[fd] = stream
        self._by_output[fd] = command
        self._poll.register(fd, select.EPOLLIN)

    def _data(self, request: int, payload: bytes) -> None:
        file = self._writing.get(request)
        if file is not None:
            if payload:
                file.add(payload)
                return
            del self._writing[request]
            error = file.finish()
            if error is not None:
                self._answers.error(request, error)
            else:
                for name in file.left_out if isinstance(file, Unpacking) else ():
                    self._answers.send(Answer.BYTES, request, os.fsencode(name))
                self._answers.done(request)
            return
        coming = self._coming.get(request)
        if coming is not None:
            ask, text = coming
            if payload:
                text += payload
                return
            del self._coming[request]
            self._shell(request, {**ask, "command": text.decode("utf-8", "surrogateescape")})
            return
        command = self._commands.get(request)
        if command is None or command.stdin < 0:
            return  # it ended, or closed its input, before all of it came
        if payload:
            command.pending += payload
        else:
            command.stdin_ends = True
        self._feed(command)

    def _halt(self, request: int) -> None:
        """Kill every process, and tell which these were and what the shells hold."""
        idle = {shell.pid for shell in self._shells.values()}
        ended = processes.command_lines(idle | {os.getpid()}, wire.MOST_ENDED)
        self._kill_everything()
        for line in ended:
            self._answers.send(Answer.ENDED, request, line)
        for key, shell in self._shells.items():
            text = shell.saved(wire.LARGEST_STATE)
            cwd = os.fsencode(shell.cwd)
            header = wire.SHELL.pack(len(key), shell.exit_code, len(cwd))
            self._answers.send(Answer.SHELL, request, header + key.encode() + cwd + text)
        self._answers.done(request)

    def _freeze(self, request: int) -> None:
        self._kill_everything()
        self._answers.done(request)

    def _kill_everything(self) -> None:
        """Kill every process but ourselves and wait until the last is gone."""
        deadline = time.monotonic() + _FREEZE
        while time.monotonic() < deadline:
            if not processes.kill_others():
                break
            self._reap(wait=_KILL_PAUSE)
        self._reap()
        if any(name.isdigit() and name != "1" for name in os.listdir("/proc")):
            raise OSError(errno.EBUSY, "processes inside did not end")

    # What happens inside

    def _event(self, fd: int) -> None:
        if fd in self._drains:
            self._drain(fd)
            return
        if fd not in self._by_output:
            return  # closed by an earlier event of this round
        command = self._by_output[fd]
        if command is None:
            self._shell_told(fd)
        elif fd == command.stdin:
            self._feed(command)
        else:
            self._collect(command, fd)

    def _collect(self, command: Command, fd: int, rounds: int = 4) -> None:
        """Take what a pipe has; a few chunks at a time, so that a flood does not keep the others waiting."""
        for _ in range(rounds):
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self._close_output(command, fd)
                return
            command.capture.add(command.outputs[fd], data)

    def _close_output(self, command: Command, fd: int) -> None:
        self._poll.unregister(fd)
        os.close(fd)
        del self._by_output[fd]
        del command.outputs[fd]

    def _feed(self, command: Command) -> None:
        try:
            while command.pending:
                del command.pending[: os.write(command.stdin, command.pending[: 1 << 16])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            command.pending.clear()
            command.stdin_ends = True
        if command.stdin_ends and not command.pending:
            self._close_stdin(command)
        elif command.stdin >= 0:
            # Nothing to write: do not be told that it could be.
            self._poll.modify(command.stdin, select.EPOLLOUT if command.pending else 0)

    def _close_stdin(self, command: Command) -> None:
        if command.stdin >= 0:
            self._poll.unregister(command.stdin)
            os.close(command.stdin)
            del self._by_output[command.stdin]
            command.stdin = -1

    def _throttle(self) -> None:
        """Stop reading the owner's socket while a command is slow in taking its input."""
        waiting = any(len(command.pending) > _STDIN_WINDOW for command in self._commands.values())
        events = (0 if waiting else select.EPOLLIN) | (select.EPOLLOUT if self._answers.waiting else 0)
        if events != self._events:
            self._events = events
            self._poll.modify(self._sock.fileno(), events)

    def _drain(self, fd: int) -> None:
        """A background process goes on writing after its command's end: read and throw away, so that it lives."""
        try:
            for _ in range(4):
                if not os.read(fd, 1 << 16):
                    break
            else:
                return
        except BlockingIOError:
            return
        self._drains.discard(fd)
        self._poll.unregister(fd)
        os.close(fd)

    def _reap(self, wait: float = 0.0) -> None:
        if wait:
            select.select([self._wake_read], [], [], wait)
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass
        for pid, status in processes.ended_children():
            self._ended(pid, processes.exit_code(status))

    def _ended(self, pid: int, code: int) -> None:
        for command in list(self._commands.values()):
            if command.pid == pid and command.shell is None:
                self._finish(command, code)
        for shell in self._shells.values():
            if shell.pid == pid:
                self._shell_ended(shell, code)

    def _shell_told(self, fd: int) -> None:
        shell = next(shell for shell in self._shells.values() if shell.control == fd)
        command = next((c for c in self._commands.values() if c.shell is shell), None)
        try:
            told = shell.told()
        except EOFError:
            # Nobody holds the pipe: bash has ended, which is told next, or was replaced (`exec`) by a program that
            # is now the command. After that program there is no shell: its end is the end of both.
            self._forget_control(shell)
            if command is None:
                processes.kill_all({shell.pid})
            return
        if told is not None and command is not None:
            self._finish(command, told[0])

    def _shell_ended(self, shell: Bash, code: int) -> None:
        try:
            told = shell.told()  # ended right after it told
        except EOFError:
            told = None
        self._forget_control(shell)
        shell.end()
        for command in list(self._commands.values()):
            if command.shell is shell:
                self._finish(command, told[0] if told else code, shell.notice())

    def _forget_control(self, shell: Bash) -> None:
        if self._by_output.pop(shell.control, self) is None:
            self._poll.unregister(shell.control)
            shell.replaced = True

    def _wait(self) -> float | None:
        deadlines = [command.deadline for command in self._commands.values() if command.deadline is not None]
        if not deadlines:
            return None
        return max(0.0, min(*deadlines, time.monotonic() + _LONGEST_POLL) - time.monotonic())

    def _expire(self) -> None:
        now = time.monotonic()
        for command in list(self._commands.values()):
            if command.deadline is None or now < command.deadline:
                continue
            if command.timed_out and command.attempts * _KILL_PAUSE > _GRACE:
                self._finish(command, 0)  # unkillable (in the kernel): do not wait for it
                continue
            command.timed_out = True
            command.attempts += 1
            command.deadline = now + _KILL_PAUSE
            others = frozenset(shell.pid for shell in self._shells.values())
            if command.shell is not None:
                command.shell.interrupt(command.attempts, others)
            else:
                processes.kill_command(command.pid, None, others)

    def _finish(self, command: Command, code: int, notice: str = "") -> None:
        del self._commands[command.request]
        self._close_stdin(command)
        for fd in list(command.outputs):
            self._collect(command, fd, rounds=_LAST_ROUNDS)
        for fd in list(command.outputs):  # still open: a background process holds it
            self._drains.add(fd)
            del self._by_output[fd]
        flags = wire.TIMED_OUT if command.timed_out else 0
        if any(command.capture.dropped.values()):
            flags |= wire.TRUNCATED
        # An upper on disk has no end but the limit on one file.
        if code == 128 + signal.SIGXFSZ or any(limits.is_full(path) for path in self._places):
            flags |= wire.DISK_FULL
        for stream, data in command.capture.chunks():
            kind = Answer.STDOUT if stream == 1 else Answer.STDERR
            for start in range(0, len(data), wire.CHUNK):
                self._answers.hold(kind, command.request, data[start : start + wire.CHUNK])
        seconds = time.monotonic() - command.started
        code = 124 if command.timed_out else code
        done = wire.DONE.pack(code, flags, seconds) + notice.encode(errors="replace")
        self._answers.send(Answer.DONE, command.request, done)
        if command.shell is not None:  # its owner has the result already
            command.shell.opened()
            if command.shell.pid:
                command.shell.prepare()
