"""One init and its owner's end of the socket: requests go in, answers are checked as the hostile bytes that they are.

A `Sandbox` has one box at a time; `reset`, `snapshot` and `fork` give it another.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import signal
import socket
import threading
import time
from typing import IO, Any, NoReturn

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import client, limits, wire
from skyrl_minisandbox.sandbox.spec import CommandResult
from skyrl_minisandbox.sandbox.wire import Answer, Ask

# How long setting up may take on a loaded machine, and how much longer than its own deadline a command's result
# may take before init counts as dead. Seconds.
READY_TIMEOUT = 60.0
ANSWER_SLACK = 30.0
_LONGEST_POLL = 1e6  # a poll takes its milliseconds as an int: what lasts longer is waited for in pieces
_USUAL = -1.0  # as a deadline: the slack from when it is waited for
_AS_JSON = json.JSONEncoder(ensure_ascii=True, allow_nan=False).encode


class TooLong(SandboxError):
    """A request that does not fit a frame; nothing of it was sent."""


class Box:
    """Made when the constructor returns, usable after `ready`. The caller serialises requests; `interrupt` and `close`
    may come from any thread at any time.

    request: the launcher's `create`. output: bytes a stream of one command may have.
    """

    def __init__(self, launcher: client.LauncherClient, request: dict[str, Any], output: int) -> None:
        self._launcher = launcher
        self._output = output
        self._closed = threading.Event()
        self._close_lock = threading.Lock()
        self._requests = 0
        self._unanswered = False
        self._frames: list[tuple[int, int, bytes]] = []
        self._reader = wire.FrameReader()
        answer, fds = launcher.ask("create", **request)
        self.number: int = answer["box"]
        self.pid: int = answer["pid"]  # of init, as the host sees it
        self._oom_path: str | None = answer["oom"]
        self._oom_kills = -1
        self._sock = socket.socket(fileno=fds[0])
        self._why = "the sandbox is closed"
        self._bounds: dict[str, Any] = request["limits"]
        self._fate: str | None = None
        try:
            launcher.adopt(self)
        except BaseException:
            self._sock.close()
            raise

    def ready(self) -> tuple[str, ...]:
        """Wait until init has verified what was asked for: the protections that are missing, of those that may be.

        Raises `SandboxError` or `MachineError` when it could not be set up; the caller closes.
        """
        kind, _, payload = self._next(time.monotonic() + READY_TIMEOUT)
        if kind == Answer.READY:
            return tuple(name for name in payload[:200].decode(errors="replace").split(",") if name)
        if kind == Answer.FAILED and len(payload) >= wire.ERRNO.size:
            (number,) = wire.ERRNO.unpack_from(payload)
            text = payload[wire.ERRNO.size :].decode(errors="replace")
            if text.startswith("proc at /proc") and number == errno.EPERM:
                raise client.explain("a private /proc is forbidden here, as a path below /proc is masked", 1, "proc")
            raise SandboxError(f"the sandbox could not be set up: {text}", hint="run `minisandbox doctor`")
        raise SandboxError("the sandbox's init answered something else than being ready")

    # Asking

    def send(self, kind: Ask, ask: dict[str, Any]) -> int:
        """Send a request; its number. Raises `TooLong`, `SandboxGone`, `ValueError` for a timeout of NaN."""
        if ask.get("timeout") == math.inf:
            ask = {**ask, "timeout": None}
        payload = _AS_JSON(ask).encode()
        if len(payload) > wire.MAX_PAYLOAD:
            raise TooLong(f"a request of {len(payload)} bytes; command and environment take {wire.MAX_PAYLOAD}")
        if self._unanswered and not self._closed.is_set():
            # Who asked did not wait for the end (Ctrl-C, an input that raised): neither side knows what comes next.
            self.broken("an earlier request was given up half way")
        if self._frames:
            self.broken("it answered before it was asked")
        if kind in (Ask.RUN, Ask.SHELL) and self._oom_path is not None:
            self._oom_kills = limits.read_oom_kills(self._oom_path)  # what was killed between two commands is neither's
        self._requests += 1
        self._unanswered = True
        self._raw_send(wire.frame(kind, self._requests, payload))
        return self._requests

    def send_data(self, request: int, data: bytes | IO[bytes], deadline: float | None = _USUAL) -> None:
        """Send what a request reads: standard input, or a file. deadline: as for `answer`, of each piece by default."""
        if isinstance(data, bytes | bytearray | memoryview):
            for start in range(0, len(data), wire.CHUNK):
                self._raw_send(wire.frame(Ask.DATA, request, bytes(data[start : start + wire.CHUNK])), deadline)
        else:
            while chunk := data.read(wire.CHUNK):
                self._raw_send(wire.frame(Ask.DATA, request, chunk), deadline)
        self._raw_send(wire.frame(Ask.DATA, request), deadline)

    def send_piece(self, request: int, data: bytes) -> None:
        """One piece of what a request reads, at most `wire.MAX_PAYLOAD`; empty for the end."""
        self._raw_send(wire.frame(Ask.DATA, request, data))

    def interrupt(self) -> None:
        try:
            self._launcher.ask("interrupt", box=self.number)
        except SandboxError:
            pass  # the launcher has ended, and every process with it

    def _raw_send(self, data: bytes, deadline: float | None = _USUAL) -> None:
        if self._closed.is_set():
            raise SandboxGone(self._why)
        if deadline == _USUAL:
            deadline = time.monotonic() + ANSWER_SLACK
        left = memoryview(data)
        while left:
            try:
                left = left[self._sock.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise SandboxGone(f"the sandbox has ended: {error.strerror}") from error

    # Answers

    @staticmethod
    def deadline(timeout: float | None) -> float | None:
        """When the result of a command that begins now is due. timeout: its own, in seconds."""
        return time.monotonic() + timeout + ANSWER_SLACK if timeout is not None else None

    def result(self, request: int, timeout: float | None, output: int | None = None) -> CommandResult:
        """What a command did. timeout: its own, in seconds. output: bytes a stream may have, the usual when None."""
        deadline = self.deadline(timeout)
        streams: dict[int, bytearray] = {Answer.STDOUT: bytearray(), Answer.STDERR: bytearray()}
        merged = bytearray()
        bound = 2 * (output or self._output) + wire.MAX_PAYLOAD
        while True:
            kind, payload = self.answer(request, deadline)
            if kind in streams:
                streams[kind] += payload
                merged += payload
                if len(streams[kind]) > bound:
                    self.broken("it sent more output than its limit")
            elif kind == Answer.DONE and len(payload) >= wire.DONE.size:
                break
            else:
                self.broken("it answered a command with something else")
        code, flags, seconds = wire.DONE.unpack_from(payload)
        return CommandResult(
            stdout=bytes(streams[Answer.STDOUT]), stderr=bytes(streams[Answer.STDERR]), exit_code=code,
            timed_out=bool(flags & wire.TIMED_OUT), truncated=bool(flags & wire.TRUNCATED),
            disk_full=bool(flags & wire.DISK_FULL), oom_killed=self._oom_happened(), seconds=seconds,
            merged=bytes(merged), notice=payload[wire.DONE.size :].decode(errors="replace"),
        )

    def ended(self, gone: SandboxGone, began: float) -> CommandResult:
        """What a command is told when the sandbox ended by what was done in it; else `gone` is raised.

        began: of time.monotonic().
        """
        fate = self.fate()
        if not fate:
            raise gone
        text = f"The sandbox was ended: {self._words(fate)}.\n".encode()
        return CommandResult(
            stdout=b"", stderr=text, exit_code=128 + signal.SIGKILL, oom_killed=fate == "oom",
            disk_full=fate == "disk_full", seconds=time.monotonic() - began, merged=text,
        )

    def _words(self, fate: str) -> str:
        if fate == "oom":
            return f"it ran out of memory (limits.memory is {self._bounds['memory']} bytes)"
        return (
            f"it wrote more than limits.disk ({self._bounds['disk']} bytes) or made more files than limits.inodes "
            f"({self._bounds['inodes']})"
        )

    def fate(self) -> str:
        """How it ended by what was done in it: "oom" or "disk_full"; "" while it lives and for every other end."""
        if self._fate is None and not self._closed.is_set():
            poll = select.poll()
            poll.register(self._sock, 0)
            try:
                if poll.poll(0):  # POLLHUP: init's end is closed
                    answer, _ = self._launcher.ask("fate", timeout=ANSWER_SLACK, box=self.number)
                    self._fate = str(answer["why"])
            except SandboxError:
                pass  # the launcher has ended
        return self._fate or ""

    def _oom_happened(self) -> bool:
        if self._oom_path is None:
            return False
        return limits.read_oom_kills(self._oom_path) > self._oom_kills >= 0

    def done(self, request: int, path: str) -> None:
        """Wait for a request's plain end. Raises `OSError` as the inside has it."""
        kind, payload = self.answer(request)
        if kind != Answer.DONE:
            raise self.os_error(kind, payload, path)

    def answer(self, request: int, deadline: float | None = _USUAL) -> tuple[int, bytes]:
        """The next frame of a request: (type, payload). deadline: of time.monotonic(); None waits for ever; the usual
        slack by default."""
        if deadline == _USUAL:
            deadline = time.monotonic() + ANSWER_SLACK
        kind, number, payload = self._next(deadline)
        if number != request:
            self.broken(f"it answered request {number}, asked was {request}")
        if kind in (Answer.DONE, Answer.ERROR):
            self._unanswered = False
        elif not payload:
            self.broken("it sent an empty piece")  # any number of them would stay below every limit
        return kind, payload

    def _next(self, deadline: float | None) -> tuple[int, int, bytes]:
        """The next frame. Raises `SandboxGone` when there will be none."""
        while not self._frames:
            self._wait(select.POLLIN, deadline)
            try:
                data = self._sock.recv(1 << 18)
            except OSError as error:
                raise SandboxGone(f"the sandbox has ended: {error.strerror}") from error
            if not data:
                closed = self._closed.is_set()
                raise SandboxGone("the sandbox was closed" if closed else "the sandbox has ended: its init is gone")
            try:
                self._frames = self._reader.feed(data)
            except wire.ProtocolError as error:
                self.broken(str(error))
        return self._frames.pop(0)

    def _wait(self, event: int, deadline: float | None) -> None:
        """Until the socket is ready. Looks at the deadline first: a flood of bytes must not outrun it."""
        poll = select.poll()
        poll.register(self._sock, event)
        while True:
            left = _LONGEST_POLL if deadline is None else deadline - time.monotonic()
            if left <= 0:
                self.broken("it did not answer in time" if event == select.POLLIN else "it did not read in time")
            if poll.poll(min(left, _LONGEST_POLL) * 1000):
                return

    def broken(self, why: str) -> NoReturn:
        """What comes from inside is not what init sends: end this sandbox, and only this one."""
        try:
            self.fate()  # if it has ended already
            self._sock.shutdown(socket.SHUT_RDWR)
            self._launcher.ask("destroy", box=self.number)
        except (OSError, SandboxError):
            pass
        raise SandboxGone(f"the sandbox was ended: {why}")

    def os_error(self, kind: int, payload: bytes, path: str) -> OSError:
        """The error that init told for a path. Raises `SandboxGone` when it told something else."""
        if kind != Answer.ERROR or len(payload) < wire.ERRNO.size:
            self.broken("it answered with something else")
        (number,) = wire.ERRNO.unpack_from(payload)
        return OSError(number, payload[wire.ERRNO.size :].decode(errors="replace") or os.strerror(number), path)

    # The end

    @property
    def alive(self) -> bool:
        """Whether init holds its end of the socket, over which it says nothing unasked."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not self._closed.is_set() and not poll.poll(0)

    def close(self, *, keep: bool = False) -> dict[str, Any]:
        """Kill everything inside; returns when it is gone. Idempotent, from any thread: whoever waits for an answer
        gets `SandboxGone`. keep: what was written becomes a layer; the answer tells which (`layer`, `bytes`, `inodes`).
        """
        with self._close_lock:
            if self._closed.is_set():
                return {}
            self._closed.set()
            if not keep:  # with it nobody waits, and init must not end before the launcher knows what to keep
                self.cut()  # wakes whoever waits for an answer
            try:
                answer, _ = self._launcher.ask("destroy", box=self.number, keep=keep)
                self._fate = self._fate or answer.pop("why", "")
                return answer
            except SandboxError:
                if keep:
                    raise
                return {}  # the launcher is gone, and every sandbox with it

    def let_go(self) -> None:
        """The same without waiting until it is gone."""
        with self._close_lock:
            if not self._closed.is_set():
                self._closed.set()
                self.cut()
                self._launcher.tell("destroy", box=self.number)
        self.hang_up()

    def cut(self) -> None:
        """Let init see its owner's end close, and whoever waits for an answer too; for when the launcher has ended."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def forked(self) -> None:
        """In a forked child of the owner: closed here, and only here."""
        self._why = "the sandbox belongs to the process that this one was forked from"
        self._closed, self._close_lock = threading.Event(), threading.Lock()
        self._closed.set()
        self._sock.close()

    def hang_up(self) -> None:
        """Give back the socket, when nobody reads from it any more: init sees its owner's end close, and ends."""
        self._sock.close()
