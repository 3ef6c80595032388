"""The public class of this room: a disposable machine around read-only layers, synchronous and thread-safe."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from skyrl_minisandbox.errors import MachineError, SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import client, scratch, transfer, wire
from skyrl_minisandbox.sandbox.box import Box, TooLong
from skyrl_minisandbox.sandbox.shell import Shell
from skyrl_minisandbox.sandbox.spec import CommandResult, SandboxSpec
from skyrl_minisandbox.sandbox.state import Change, FrozenLayer, ShellState, Snapshot, remove_tree
from skyrl_minisandbox.sandbox.wire import Answer, Ask

# Protections that `allow_degraded` may name.
DEGRADABLE = ("proc",)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CHANGES_LIMIT = 1_000_000
_HALT_SLACK = 60.0  # killing everything inside and reading what its shells hold, on a loaded machine
# A tmpfs takes 0 for "no limit".
_LEAST_DISK, _LEAST_INODES = 1 << 20, 64


class Sandbox:
    """Namespaces and an overlay over `spec.layers`, with limits. Ready when the constructor returns.

    Whatever the agent does inside is a `CommandResult`. Raised are only `SandboxError` (it could not be made, or its
    init broke the protocol), `SandboxGone` (it has ended: closed, or its init was killed from outside) and
    `MachineError` (the kernel lacks something).

    One request at a time is answered; threads wait for each other. `close` may be called from any thread at any
    time and ends a request that is under way. Waiting does not hold the GIL.
    """

    _box: Box
    _upper: Path | None

    def __init__(self, spec: SandboxSpec, launcher: client.LauncherClient | None = None) -> None:
        self._prepare(spec, launcher or client.shared(), [])
        if spec.start_shell:
            self.prepared(self._new_shell())
        self._open()
        self._await()

    def _prepare(self, spec: SandboxSpec, launcher: client.LauncherClient, frozen: list[FrozenLayer]) -> None:
        _check(spec)
        self.spec = spec
        self.lost: tuple[str, ...] = ()  # protections missing here, of those that `allow_degraded` names
        self._launcher = launcher
        self._frozen = frozen  # uppers of before, above the spec's layers, the lowest first
        self._lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._closed = False
        self._used_upper = False  # the directory that the spec names is one sandbox's, once
        client.keep_from_children(self)
        self._shells: list[Shell] = []
        self._keys = 0  # of shells, so far
        self._first_shell: Shell | None = None  # made before anybody asked: the first `shell()` gives it

    def _open(self) -> None:
        """Have a box made; `_await` waits for it, so that several can be made at once."""
        self._upper = self._place_upper()
        try:
            self._box = Box(self._launcher, self._request(), self.spec.limits.output)
        except BaseException:
            if self._upper is not None:
                remove_tree(self._upper)
            raise

    def _await(self) -> None:
        try:
            self.lost = self._box.ready()
        except BaseException:
            self._closed = True
            self._release()
            raise

    def _request(self) -> dict[str, Any]:
        spec = self.spec
        layers: list[str | int] = []
        for layer in (*spec.layers, *self._frozen):
            if not isinstance(layer, FrozenLayer):
                layers.append(os.path.realpath(layer))
            elif layer.launcher is self._launcher:
                layers.append(layer.number)
            else:
                raise SandboxError("the snapshot's launcher has ended, and the snapshot with it")
        bounds = dataclasses.asdict(spec.limits)
        # What was frozen goes on taking the room that this sandbox may have.
        bounds["disk"] = max(bounds["disk"] - sum(layer.bytes for layer in self._frozen), _LEAST_DISK)
        bounds["inodes"] = max(bounds["inodes"] - sum(layer.inodes for layer in self._frozen), _LEAST_INODES)
        return {
            "layers": layers, "base": len(spec.layers), "keep": list(spec.keep), "hostname": spec.hostname,
            "binds": [{**dataclasses.asdict(bind), "source": os.path.realpath(bind.source)} for bind in spec.binds],
            "shell": self._started_shell(), "network": spec.network, "limits": bounds, "private_tmp": spec.private_tmp,
            "allow_degraded": list(spec.allow_degraded),
            "upper": os.path.realpath(self._upper) if self._upper is not None else None,
        }

    def _started_shell(self) -> dict[str, Any] | None:
        """The first shell, for init to start at once; none where a shell must read first what it goes on with."""
        if not self.spec.start_shell or any(shell._state is not None for shell in self._shells):
            return None
        return self._shells[0].ask()

    def _place_upper(self) -> Path | None:
        """The directory of an upper on disk, made; None for a tmpfs."""
        upper = self.spec.upper
        if upper is not None and self._used_upper:
            upper = upper.with_name(f"{upper.name}-{secrets.token_hex(8)}")
        elif upper is None and (self.spec.on_disk or not self._launcher.facts["tmpfs_upper"]):
            if self.spec.scratch is None:
                raise MachineError(
                    "this kernel cannot hold a plain user's upper on tmpfs, and no directory for one on disk is given",
                    hint="set `images.cache=DIR` to a directory on ext4, xfs or btrfs",
                )
            upper = scratch.place(self.spec.scratch)
        self._used_upper = True
        if upper is not None:
            try:
                upper.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MachineError(
                    f"the upper directory {upper} cannot be made: {error.strerror}",
                    hint="set `images.cache=DIR` to a directory you can write to",
                ) from error
        return upper

    @property
    def pid(self) -> int:
        """Of init, as the host sees it; another one after `reset`, `snapshot` and `fork`."""
        return self._box.pid

    @property
    def ended_by(self) -> str:
        """How it ended by what was done in it: "oom" (no memory was left for its init), "disk_full" (an upper on disk
        beyond its limits), "" while it lives and for every other end. Commands then say the same; files are gone."""
        return self._box.fate()

    @property
    def alive(self) -> bool:
        """Whether its init is there. Asked while nothing is under way; costs no answer from inside."""
        return not self._closed and self._launcher.alive and self._box.alive

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
        output: int | None = None,
    ) -> CommandResult:
        """Run one command, stateless; a string goes to `bash -c`.

        input: what it reads on standard input; nothing otherwise. env: added to the spec's. timeout: seconds, then its
        process tree is killed, `timed_out` is told and the output so far is kept; None: `limits.command_seconds`.
        output: bytes kept of each stream; None: `limits.output`.
        A program or directory that does not exist is a result too (exit code 127, 126), as in a shell.
        """
        timeout = self._deadline(timeout)
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        ask = {
            "argv": argv, "env": self._environment(env), "cwd": cwd or self.spec.workdir, "user": user,
            "timeout": timeout, "input": input is not None, "output": output or self.spec.limits.output,
        }
        began = time.monotonic()
        with self._lock:
            try:
                request = self._box.send(Ask.RUN, ask)
                if input is not None:
                    self._box.send_data(request, input, self._box.deadline(timeout))
                return self._box.result(request, timeout, output)
            except TooLong:  # more than a kernel takes anyway: told as a shell tells it
                text = f"{argv[0]}: {os.strerror(errno.E2BIG)}\n".encode(errors="replace")
                return CommandResult(stdout=b"", stderr=text, exit_code=126, merged=text)
            except SandboxGone as gone:
                return self._box.ended(gone, began)

    def _deadline(self, timeout: float | None) -> float | None:
        return self.spec.limits.command_seconds if timeout is None else timeout

    def shell(self, *, user: str | None = None, env: Mapping[str, str] | None = None, cwd: str | None = None) -> Shell:
        """A new persistent bash. It starts with its first command; with `spec.start_shell` and from a `Pool`
        there is one that has started, for who asks first and without arguments."""
        with self._lock:
            if self._first_shell is not None and user is None and env is None and cwd is None:
                first, self._first_shell = self._first_shell, None
                return first
            return self._new_shell(user, env, cwd)

    def _new_shell(
        self, user: str | None = None, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> Shell:
        self._keys += 1
        shell = Shell(self, f"s{self._keys}", self._environment(env), cwd or self.spec.workdir, user)
        self._shells.append(shell)
        return shell

    def prepared(self, shell: Shell) -> None:
        """That one is what the first `shell()` gives."""
        self._first_shell = shell

    @property
    def shells(self) -> tuple[Shell, ...]:
        """Every shell made since the last `reset`, in order; in a fork, those of its parent, as they were."""
        return tuple(self._shells)

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        base = {"PATH": DEFAULT_PATH, "HOME": "/root", "TERM": "dumb", "LANG": "C.UTF-8"}
        return {**base, **self.spec.env, **(env or {})}

    def interrupt(self) -> None:
        """Kill every process inside but init, now: a command that another thread waits for ends with 137.

        Not waited for; what is started afterwards runs. From any thread, at any time.
        """
        self._box.interrupt()

    def freeze(self) -> None:
        """Kill every process inside but init: from here on nothing changes by itself. Commands may follow."""
        with self._lock:
            request = self._box.send(Ask.FREEZE, {})
            kind, payload = self._box.answer(request)
            if kind != Answer.DONE:
                self._box.broken(f"processes inside did not end: {payload[4:200].decode(errors='replace')}")

    # Files

    def read_file(self, path: str, *, limit: int = 64 << 20) -> bytes:
        """The bytes of a regular file, opened by the sandbox's own init.

        Raises `OSError` as the inside has it: no such file, EFBIG beyond `limit` bytes, EINVAL for what is no file.
        """
        with self._lock:
            return transfer.read_file(self._box, self._absolute(path), limit)

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file, its missing directories too, by the sandbox's own init. Raises `OSError` as the inside has it
        (ENOSPC when its disk is full)."""
        with self._lock:
            transfer.write_file(self._box, self._absolute(path), data, mode)

    def put_tree(self, source: Path, target: str) -> list[str]:
        """Copy a file or directory of this machine to `target` inside, which then is that file or directory.

        Files there are replaced, directories filled. Modes (without set-id bits), times and links come along, owners
        do not: root's. Returns what was left out: devices, FIFOs and sockets. Raises `OSError` as either side has it.
        """
        with self._lock:
            return transfer.put_tree(self._box, source, self._absolute(target))

    def get_tree(
        self, path: str, target: Path, *, max_bytes: int = transfer.MOST_BYTES, max_members: int = transfer.MOST_MEMBERS
    ) -> list[str]:
        """Copy a file or directory from inside to `target` on this machine, which then is that file or directory.

        The same rules as for `put_tree`; owners are the caller's. Links are copied as they are, wherever they lead, and
        never followed, here or there. Raises `OSError`: EFBIG beyond `max_bytes` or `max_members`.
        """
        with self._lock:
            return transfer.get_tree(self._box, self._absolute(path), target, max_bytes, max_members)

    def _absolute(self, path: str) -> str:
        return os.path.join(self.spec.workdir, path)

    # State

    def reset(self) -> None:
        """Drop everything that was written and every process: as made anew. A shell of before starts anew too.
        What was there may take a moment longer to end than this call.

        Raises as the constructor does; then the sandbox is closed.
        """
        with self._lock:
            self._still_open()
            old, upper = self._box, self._upper
            self._frozen = []
            for shell in self._shells:
                shell._state = None
            self._shells = []
            if self.spec.start_shell:
                self.prepared(self._new_shell())
            try:
                self._renew()  # before the old one ends: what takes time there goes on beside this
            finally:
                if upper is None:
                    old.let_go()
                else:
                    old.close()
                    old.hang_up()
                    remove_tree(upper)
            self._await()

    def snapshot(self) -> Snapshot:
        """Freeze the files as a layer. Ends every process inside, as `ended` tells; files in /dev/shm go.

        This sandbox goes on: its shells keep their directory, exported variables and functions, and the next result of
        each says in `notice` what was ended. Raises as the constructor does; then the sandbox is closed.
        """
        with self._lock:
            ended = self._halt()
            self._renew()
            self._await()
            return Snapshot((*self.spec.layers, *self._frozen), ended)

    def fork(self, n: int = 1) -> list[Sandbox]:
        """`n` sandboxes that start from this one's files, each with its own `shells`, which go on where these are.

        Afterwards neither sees what the other writes. This sandbox goes on as after `snapshot`. `limits.disk` is for
        all that was written since the layers of the spec. Raises as the constructor does; then there are no children.
        """
        children: list[Sandbox] = []
        with self._lock:
            self._halt()
            try:
                self._renew()
                for _ in range(n):
                    child = Sandbox.__new__(Sandbox)
                    child._prepare(self.spec, self._launcher, list(self._frozen))
                    child._used_upper = True
                    child._shells = [shell._copy(child) for shell in self._shells]
                    child._keys = self._keys
                    child._open()
                    children.append(child)
                self._await()
                for child in children:
                    child._await()
            except BaseException:
                for child in children:
                    child.close()
                raise
        return children

    def _renew(self) -> None:
        try:
            self._open()
        except BaseException:
            self._closed = True
            self._release()
            raise

    def _halt(self) -> tuple[str, ...]:
        """End every process and then the box, and keep what was written as a layer; what was ended."""
        self._still_open()
        box, upper = self._box, self._upper
        request = box.send(Ask.HALT, {})
        states: dict[str, ShellState] = {}
        ended: list[str] = []
        deadline = time.monotonic() + _HALT_SLACK
        while True:
            kind, payload = box.answer(request, deadline)
            if kind == Answer.SHELL and len(states) < len(self._shells):
                try:
                    key, state = ShellState.unpack(payload)
                except ValueError as error:
                    box.broken(str(error))
                states[key] = state
            elif kind == Answer.ENDED and len(ended) < wire.MOST_ENDED:
                ended.append(payload.decode(errors="replace"))
            elif kind == Answer.DONE:
                break
            else:
                box.broken("it did not halt")
        kept = box.close(keep=True)
        if not kept:
            self._still_open()
            raise SandboxGone("the sandbox has ended")
        box.hang_up()
        self._upper = None
        layer = FrozenLayer(self._launcher, kept["layer"], kept["bytes"], kept["inodes"], upper)
        self._frozen = [*self._frozen, layer]
        for shell in self._shells:
            if shell._key in states:
                shell._state = dataclasses.replace(states[shell._key], ended=tuple(ended))
        return tuple(ended)

    def changes(self, *, limit: int = _CHANGES_LIMIT) -> list[Change]:
        """What differs from the spec's layers, sorted, parents first; what happens meanwhile may be in it or not.

        Contents are compared: a file that was written back as it was is no change; nor are the mount points of the
        sandbox itself (/proc, /dev, /tmp and those of binds). Raises `OSError(EFBIG)` beyond
        `limit` paths.
        """
        ours = {"/proc", "/dev", "/tmp"}  # made, or given its mode, where an image lacks it
        for bind in self.spec.binds:
            ours |= {bind.target, *map(str, Path(bind.target).parents)}
        told = io.BytesIO()
        with self._lock:
            self._piped("changes", told, limit=limit + len(ours))
        kinds = {b"A": "added", b"M": "modified", b"R": "removed"}
        lines = [(os.fsdecode(b"/" + line[1:]), kinds[line[:1]]) for line in told.getvalue().split(b"\0")[:-1]]
        found = [Change(path, kind) for path, kind in lines if path not in ours]  # type: ignore[arg-type]
        if len(found) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/")
        return found

    def export_layer(
        self, file: IO[bytes], *, prefix: str = "", max_bytes: int = transfer.MOST_BYTES,
        max_members: int = transfer.MOST_MEMBERS,
    ) -> None:
        """Freeze, then write what differs from the spec's layers as an uncompressed OCI layer tar.

        prefix: only this directory. Raises `OSError(EFBIG)` when it would be larger than `max_bytes` or have more
        than `max_members`.
        """
        self.freeze()
        self._piped("export", file, prefix=prefix, max_bytes=max_bytes, max_members=max_members)

    def _piped(self, verb: str, file: IO[bytes], **request: Any) -> None:
        self._still_open()
        code = self._launcher.pipe(verb, file, box=self._box.number, **request)
        if code:
            raise OSError(code, os.strerror(code), request.get("prefix") or "/")

    # The end

    def forked(self) -> None:
        """Called in a forked child of the owner: closed there, and only there."""
        self._lock, self._close_lock = threading.Lock(), threading.Lock()
        self._closed = True
        self._upper = None
        if hasattr(self, "_box"):
            self._box.forked()

    def _still_open(self) -> None:
        if self._closed:
            raise SandboxGone("the sandbox is closed")

    def close(self) -> None:
        """Kill everything inside and give back what it held. Idempotent, from any thread."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            self._box.close()  # whoever waits for an answer lets go of the lock
            with self._lock:
                self._release()

    def _release(self) -> None:
        self._box.close()
        self._box.hang_up()
        if self._upper is not None:
            remove_tree(self._upper)
            self._upper = None
        self._frozen = []
        self._launcher.forget_released()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        box = getattr(self, "_box", None)
        if box is not None:
            box.hang_up()  # init sees its owner's end close, and ends


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
    if spec.on_disk and spec.scratch is None:
        raise SandboxError("an upper on disk needs a directory to lie in: `SandboxSpec.scratch`")
    if spec.upper is None and not spec.on_disk and spec.limits.disk >= spec.limits.memory:
        raise SandboxError(
            f"limits.disk ({spec.limits.disk} bytes) must be below limits.memory ({spec.limits.memory} bytes) "
            "while the upper is on tmpfs, or a full disk would look like running out of memory"
        )
