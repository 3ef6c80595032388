"""The public class of this room: a disposable machine around read-only layers, synchronous and thread-safe."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import select
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from skyrl_minisandbox.errors import MachineError, SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import client, limits, wire
from skyrl_minisandbox.sandbox.spec import CommandResult, SandboxSpec
from skyrl_minisandbox.sandbox.wire import Answer, Ask

# How long setting up may take on a loaded machine, and how much longer than its own deadline a command's result
# may take before init counts as dead. Seconds.
READY_TIMEOUT = 60.0
ANSWER_SLACK = 30.0
EXPORT_TIMEOUT = 1800.0  # a compiled scientific environment has gigabytes, and its reader compresses them
# Protections that `allow_degraded` may name.
DEGRADABLE = ("proc",)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_EXPORT_LIMIT = 16 << 30
_MEMBERS_LIMIT = 4_000_000


class _TooLong(SandboxError):
    """A request that does not fit a frame; nothing of it was sent."""


class Sandbox:
    """Namespaces and an overlay over `spec.layers`, with limits. Ready when the constructor returns.

    Whatever the agent does inside is a `CommandResult`. Raised are only `SandboxError` (it could not be made, or its
    init broke the protocol), `SandboxGone` (it has ended: closed, or its init was killed from outside) and
    `MachineError` (the kernel lacks something).

    One request at a time is answered; threads wait for each other. `close` may be called from any thread at any
    time and ends a request that is under way. Waiting does not hold the GIL.
    """

    def __init__(self, spec: SandboxSpec, launcher: client.LauncherClient | None = None) -> None:
        self.spec = spec
        self.lost: tuple[str, ...] = ()  # protections missing here, of those that `allow_degraded` names
        self._launcher = launcher or client.shared()
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()  # one frame at a time: `interrupt` comes in between
        self._closed = threading.Event()
        self._close_lock = threading.Lock()
        self._requests = 0
        self._shells = 0
        self._frames: list[tuple[int, int, bytes]] = []
        self._reader = wire.FrameReader()
        self._check(spec)
        self._upper = self._place_upper()
        try:
            answer, fds = self._create()
        except BaseException:
            if self._upper is not None:
                remove_tree(self._upper)
            raise
        self._box: int = answer["box"]
        self.pid: int = answer["pid"]  # of init, as the host sees it
        self._oom_path: str | None = answer["oom"]
        self._oom_kills = limits.read_oom_kills(self._oom_path) if self._oom_path else -1
        self._sock = socket.socket(fileno=fds[0])
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _check(spec: SandboxSpec) -> None:
        """Refuse what cannot go together, both names told. Raises `SandboxError`."""
        if not spec.layers:
            raise SandboxError("a sandbox needs at least one layer")
        if spec.network not in ("none", "host"):
            raise SandboxError(f"network is `none` or `host`, not `{spec.network}`")
        for name in spec.allow_degraded:
            if name not in DEGRADABLE:
                raise SandboxError(f"`{name}` is no protection that may be lost; known: {', '.join(DEGRADABLE)}")
        for path in (*spec.keep, *(bind.target for bind in spec.binds), spec.workdir):
            if not path.startswith("/") or ".." in path.split("/"):
                raise SandboxError(f"`{path}` is not an absolute path inside the sandbox")
        if spec.upper is None and spec.limits.disk >= spec.limits.memory:
            raise SandboxError(
                f"limits.disk ({spec.limits.disk} bytes) must be below limits.memory ({spec.limits.memory} bytes) "
                "while the upper is on tmpfs, or a full disk would look like running out of memory"
            )

    def _create(self) -> tuple[dict[str, Any], list[int]]:
        spec = self.spec
        return self._launcher.ask(
            "create",
            layers=[os.path.realpath(layer) for layer in spec.layers],
            binds=[{**dataclasses.asdict(bind), "source": os.path.realpath(bind.source)} for bind in spec.binds],
            keep=list(spec.keep), hostname=spec.hostname, network=spec.network,
            limits=dataclasses.asdict(spec.limits), private_tmp=spec.private_tmp,
            allow_degraded=list(spec.allow_degraded),
            upper=os.path.realpath(self._upper) if self._upper is not None else None,
        )

    def _place_upper(self) -> Path | None:
        """The directory of an upper on disk, made; None for a tmpfs."""
        upper = self.spec.upper
        if upper is None and not self._launcher.facts["tmpfs_upper"]:
            if self.spec.scratch is None:
                raise MachineError(
                    "this kernel cannot hold a plain user's upper on tmpfs, and no directory for one on disk is given",
                    hint="set `images.cache=DIR` to a directory on ext4, xfs or btrfs",
                )
            upper = self.spec.scratch / secrets.token_hex(8)
        if upper is not None:
            try:
                upper.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MachineError(
                    f"the upper directory {upper} cannot be made: {error.strerror}",
                    hint="set `images.cache=DIR` to a directory you can write to",
                ) from error
        return upper

    def _await_ready(self) -> None:
        kind, _, payload = self._next(time.monotonic() + READY_TIMEOUT)
        if kind == Answer.READY:
            self.lost = tuple(name for name in payload[:200].decode(errors="replace").split(",") if name in DEGRADABLE)
            return
        if kind == Answer.FAILED and len(payload) >= wire.ERRNO.size:
            (number,) = wire.ERRNO.unpack_from(payload)
            text = payload[wire.ERRNO.size :].decode(errors="replace")
            if text.startswith("proc at /proc") and number == errno.EPERM:
                raise client.explain("a private /proc is forbidden here, as a path below /proc is masked", 1, "proc")
            raise SandboxError(f"the sandbox could not be set up: {text}", hint="run `minisandbox doctor`")
        raise SandboxError("the sandbox's init answered something else than being ready")

    # Commands

    def run(
        self,
        command: list[str] | str,
        *,
        input: bytes | IO[bytes] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run one command, stateless; a string goes to `bash -c`.

        input: what it reads on standard input; nothing otherwise. env: added to the spec's. timeout: seconds, then its
        process tree is killed, `timed_out` is told and the output so far is kept; None waits for ever.
        A program or directory that does not exist is a result too (exit code 127, 126), as in a shell.
        """
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        ask = {
            "argv": argv, "env": self._environment(env), "cwd": cwd or self.spec.workdir, "user": user,
            "timeout": timeout, "input": input is not None,
        }
        with self._lock:
            try:
                request = self._send(Ask.RUN, ask)
            except _TooLong:  # more than a kernel takes anyway: told as a shell tells it
                text = f"{argv[0]}: {os.strerror(errno.E2BIG)}\n".encode(errors="replace")
                return CommandResult(stdout=b"", stderr=text, exit_code=126, merged=text)
            if input is not None:
                self._send_data(request, input)
            return self._result(request, timeout)

    def shell(self, *, user: str | None = None, env: Mapping[str, str] | None = None, cwd: str | None = None) -> Shell:
        """A new persistent bash. It starts with its first command."""
        with self._lock:
            self._shells += 1
            key = f"s{self._shells}"
        return Shell(self, key, self._environment(env), cwd or self.spec.workdir, user)

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        base = {"PATH": DEFAULT_PATH, "HOME": "/root", "TERM": "dumb", "LANG": "C.UTF-8"}
        return {**base, **self.spec.env, **(env or {})}

    # Files

    def read_file(self, path: str, *, limit: int = 64 << 20) -> bytes:
        """The bytes of a regular file, opened by the sandbox's own init.

        Raises `OSError` as the inside has it: no such file, EFBIG beyond `limit` bytes, EINVAL for what is no file.
        """
        with self._lock:
            request = self._send(Ask.READ, {"path": self._absolute(path), "limit": limit})
            data = bytearray()
            while True:
                kind, payload = self._answer(request, time.monotonic() + ANSWER_SLACK)
                if kind == Answer.BYTES:
                    data += payload
                    if len(data) > limit:
                        self._break("it sent more of a file than was asked for")
                elif kind == Answer.DONE:
                    return bytes(data)
                else:
                    raise self._os_error(kind, payload, path)

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file, its missing directories too, by the sandbox's own init. Raises `OSError` as the inside has it
        (ENOSPC when its disk is full)."""
        with self._lock:
            request = self._send(Ask.WRITE, {"path": self._absolute(path), "mode": mode})
            self._send_data(request, data)
            kind, payload = self._answer(request, time.monotonic() + ANSWER_SLACK)
            if kind != Answer.DONE:
                raise self._os_error(kind, payload, path)

    def _absolute(self, path: str) -> str:
        return os.path.join(self.spec.workdir, path)

    def interrupt(self) -> None:
        """Kill every process inside but init, now: a command that another thread waits for ends with 137.

        Not waited for; what is started afterwards runs. From any thread, at any time.
        """
        try:
            self._raw_send(wire.frame(Ask.INTERRUPT, 0))
        except SandboxGone:
            pass

    def freeze(self) -> None:
        """Kill every process inside but init: from here on nothing changes by itself. Commands may follow."""
        with self._lock:
            request = self._send(Ask.FREEZE, {})
            kind, payload = self._answer(request, time.monotonic() + ANSWER_SLACK)
            if kind != Answer.DONE:
                self._break(f"processes inside did not end: {payload[4:200].decode(errors='replace')}")

    def export_layer(
        self, file: IO[bytes], *, prefix: str = "", max_bytes: int = _EXPORT_LIMIT, max_members: int = _MEMBERS_LIMIT
    ) -> None:
        """Freeze, then write what differs from the layers as an uncompressed OCI layer tar.

        prefix: only this directory. Raises `OSError(EFBIG)` when it would be larger than `max_bytes` or have more
        than `max_members`.
        """
        self.freeze()
        read, write = os.pipe2(os.O_CLOEXEC)
        failed: list[BaseException] = []

        def copy() -> None:
            try:
                with open(read, "rb") as source:
                    shutil.copyfileobj(source, file, 1 << 18)
            except BaseException as error:  # a full disk where it goes: told below
                failed.append(error)

        copier = threading.Thread(target=copy, name="minisandbox-export")
        copier.start()
        try:
            with open(write, "wb") as ours:
                # The copier ends at EOF, which comes when the exporter's descriptor and ours are closed.
                answer = self._export(ours.fileno(), prefix, max_bytes, max_members)
        finally:
            copier.join()
        if failed:
            raise failed[0]
        if answer["code"]:
            raise OSError(answer["code"], os.strerror(answer["code"]), prefix or "/")

    def _export(self, fd: int, prefix: str, max_bytes: int, max_members: int) -> dict[str, Any]:
        if self._closed.is_set():
            raise SandboxGone("the sandbox is closed")
        answer, _ = self._launcher.ask(
            "export", (fd,), EXPORT_TIMEOUT, box=self._box, prefix=prefix, max_bytes=max_bytes, max_members=max_members
        )
        return answer

    # The end

    def close(self) -> None:
        """Kill everything inside and give back what it held. Idempotent, from any thread."""
        with self._close_lock:
            if self._closed.is_set():
                return
            self._closed.set()
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for an answer
            except OSError:
                pass
            try:
                self._launcher.ask("destroy", box=self._box)
            except SandboxError:
                pass  # the launcher is gone, and every sandbox with it
            with self._lock:
                self._sock.close()
            if self._upper is not None:
                remove_tree(self._upper)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        sock = getattr(self, "_sock", None)
        if sock is not None:
            sock.close()  # init sees its owner's end close, and ends

    # The wire

    def _send(self, kind: Ask, ask: dict[str, Any]) -> int:
        payload = json.dumps(ask, ensure_ascii=True).encode()
        if len(payload) > wire.MAX_PAYLOAD:
            raise _TooLong(f"a request of {len(payload)} bytes; command and environment take {wire.MAX_PAYLOAD}")
        self._requests += 1
        self._raw_send(wire.frame(kind, self._requests, payload))
        return self._requests

    def _send_data(self, request: int, data: bytes | IO[bytes]) -> None:
        if isinstance(data, bytes | bytearray | memoryview):
            for start in range(0, len(data), wire.CHUNK):
                self._raw_send(wire.frame(Ask.DATA, request, bytes(data[start : start + wire.CHUNK])))
        else:
            while chunk := data.read(wire.CHUNK):
                self._raw_send(wire.frame(Ask.DATA, request, chunk))
        self._raw_send(wire.frame(Ask.DATA, request))

    def _raw_send(self, data: bytes) -> None:
        if self._closed.is_set():
            raise SandboxGone("the sandbox is closed")
        try:
            with self._send_lock:
                self._sock.sendall(data)
        except OSError as error:
            raise SandboxGone(f"the sandbox has ended: {error.strerror}") from error

    def _result(self, request: int, timeout: float | None) -> CommandResult:
        deadline = time.monotonic() + timeout + ANSWER_SLACK if timeout is not None else None
        streams: dict[int, bytearray] = {Answer.STDOUT: bytearray(), Answer.STDERR: bytearray()}
        merged = bytearray()
        bound = 2 * self.spec.limits.output + wire.MAX_PAYLOAD
        while True:
            kind, payload = self._answer(request, deadline)
            if kind in streams:
                streams[kind] += payload
                merged += payload
                if len(streams[kind]) > bound:
                    self._break("it sent more output than its limit")
            elif kind == Answer.DONE and len(payload) >= wire.DONE.size:
                break
            else:
                self._break("it answered a command with something else")
        code, flags, seconds = wire.DONE.unpack_from(payload)
        return CommandResult(
            stdout=bytes(streams[Answer.STDOUT]), stderr=bytes(streams[Answer.STDERR]), exit_code=code,
            timed_out=bool(flags & wire.TIMED_OUT), truncated=bool(flags & wire.TRUNCATED),
            disk_full=bool(flags & wire.DISK_FULL), oom_killed=self._oom_happened(), seconds=seconds,
            merged=bytes(merged), notice=payload[wire.DONE.size :].decode(errors="replace"),
        )

    def _oom_happened(self) -> bool:
        if self._oom_path is None:
            return False
        before, self._oom_kills = self._oom_kills, limits.read_oom_kills(self._oom_path)
        return self._oom_kills > before >= 0

    def _answer(self, request: int, deadline: float | None) -> tuple[int, bytes]:
        kind, number, payload = self._next(deadline)
        if number != request:
            self._break(f"it answered request {number}, asked was {request}")
        return kind, payload

    def _next(self, deadline: float | None) -> tuple[int, int, bytes]:
        """The next frame. Raises `SandboxGone` when there will be none."""
        while not self._frames:
            # The socket itself blocks, for senders on other threads; waiting with a deadline is poll's.
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if not poll.poll(None if deadline is None else max(deadline - time.monotonic(), 0) * 1000):
                self._break("it did not answer in time")
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
                self._break(str(error))
        return self._frames.pop(0)

    def _break(self, why: str) -> Any:
        """What comes from inside is not what init sends: end this sandbox, and only this one."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
            self._launcher.ask("destroy", box=self._box)
        except (OSError, SandboxError):
            pass
        raise SandboxGone(f"the sandbox was ended: {why}")

    def _os_error(self, kind: int, payload: bytes, path: str) -> Exception:
        if kind != Answer.ERROR or len(payload) < wire.ERRNO.size:
            self._break("it answered with something else")
        (number,) = wire.ERRNO.unpack_from(payload)
        return OSError(number, payload[wire.ERRNO.size :].decode(errors="replace"), path)


class Shell:
    """A persistent bash inside a sandbox; see `sandbox/bash.py` for how. Made by `Sandbox.shell`."""

    def __init__(self, sandbox: Sandbox, key: str, env: dict[str, str], cwd: str, user: str | None) -> None:
        self._sandbox, self._key, self._env, self._cwd, self._user = sandbox, key, env, cwd, user

    def run(self, command: str, *, timeout: float | None = None) -> CommandResult:
        """Run a command in the shell: directory, variables and functions stay for the next one.

        Output is one stream. `exit`, `exec`, `set -e` and a killed shell give their exit code, and the next command
        finds a fresh shell with the old exports and directory (`notice` says so).
        timeout: seconds; then what the command started is killed, the shell and its earlier background jobs live on.
        """
        sandbox = self._sandbox
        with sandbox._lock:
            try:
                data = command.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:  # half a surrogate pair, which a model's JSON can hold and no file
                data = command.encode("utf-8", "replace")
                command = data.decode()
            ask = {
                "shell": self._key, "env": self._env, "cwd": self._cwd, "user": self._user, "timeout": timeout,
                "command": command,
            }
            if len(data) > wire.CHUNK:
                ask["command"], ask["size"] = "", len(data)
            request = sandbox._send(Ask.SHELL, ask)
            if "size" in ask:
                sandbox._send_data(request, data)
            return sandbox._result(request, timeout)


def remove_tree(path: Path) -> None:
    """Remove a tree of ours whatever its modes are: overlay's work directory has mode 000."""
    for directory, _, _ in os.walk(path):
        try:
            os.chmod(directory, 0o700)
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
        except OSError:
            pass
    shutil.rmtree(path, ignore_errors=True)
