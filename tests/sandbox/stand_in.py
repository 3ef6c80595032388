"""A stand-in for a sandbox's init: what an agent that had taken init over could send to the owner."""

from __future__ import annotations

import dataclasses
import errno
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec, wire
from skyrl_minisandbox.sandbox.wire import Answer
from tests.support import seconds

DONE = wire.DONE.pack(0, 0, 0.0)
MEMBER = struct.Struct("!BHqHH")  # see sandbox/tree.py


def examples(count: int) -> settings:
    """So many, none of them judged by its time, nothing kept on disk."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=quiet,
        phases=(Phase.explicit, Phase.generate),  # a hang found is not sought again and again
    )


class StandIn:
    """A real sandbox whose owner talks to us. The real init keeps its end: only being destroyed ends it."""

    def __init__(self, spec: SandboxSpec) -> None:
        self.sandbox = Sandbox(spec)
        self.init = self.sandbox.pid
        box = self.sandbox._box
        self._real = box._sock
        box._sock, self.socket = socket.socketpair()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sandbox.close()
        self.socket.close()
        self._real.close()
        for thread in self._threads:
            thread.join(seconds(20))
            assert not thread.is_alive()

    def send(self, stream: bytes) -> None:
        """The stream and then EOF; what the owner sends is read and thrown away."""
        self.socket.sendall(stream)
        self.socket.shutdown(socket.SHUT_WR)
        self.swallow()

    def swallow(self) -> None:
        def read() -> None:
            try:
                while self.socket.recv(1 << 20):
                    pass
            except OSError:
                pass

        self._start(read)

    def flood(self, pieces: Iterator[bytes]) -> None:
        """Pieces for as long as somebody takes them."""

        def write() -> None:
            try:
                for piece in pieces:
                    self.socket.sendall(piece)
            except OSError:
                pass

        self._start(write)

    def _start(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, daemon=True))
        self._threads[-1].start()


@dataclasses.dataclass
class Ended:
    """How a call ended: with a value or an exception."""

    value: Any = None
    error: BaseException | None = None


def watched(sandbox: Sandbox, call: Callable[[], Any], limit: float = 60.0) -> Ended:
    """Run a call that must end within `limit` seconds, whatever happens on the wire."""
    ended = Ended()

    def work() -> None:
        try:
            ended.value = call()
        except BaseException as error:
            ended.error = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds(limit))
    if thread.is_alive():
        sandbox.close()  # lets the thread go
        thread.join(seconds(20))
        raise AssertionError(f"the owner hung for {limit} s")
    return ended


def _put_tree(sandbox: Sandbox) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "file").write_bytes(b"x" * 1000)
        return sandbox.put_tree(Path(directory), "/testbed/tree")


def _get_tree(sandbox: Sandbox) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        return sandbox.get_tree("/testbed", Path(directory, "tree"), max_bytes=1 << 20, max_members=100)


def _get_tree_nowhere(sandbox: Sandbox) -> Any:
    return sandbox.get_tree("/testbed", Path("/dev/null/tree"), max_bytes=1 << 20, max_members=100)


# Every request that has an answer.
REQUESTS: dict[str, Callable[[Sandbox], Any]] = {
    "run": lambda sandbox: sandbox.run(["true"], timeout=5),
    "run for ever": lambda sandbox: sandbox.run(["true"]),
    "input": lambda sandbox: sandbox.run(["cat"], input=b"x" * 100_000, timeout=5),
    "shell": lambda sandbox: sandbox.shell().run("true", timeout=5),
    "long command": lambda sandbox: sandbox.shell().run("#" * 300_000, timeout=5),
    "read": lambda sandbox: sandbox.read_file("/testbed/lower.txt", limit=1 << 20),
    "write": lambda sandbox: sandbox.write_file("/testbed/new", b"x" * 100_000),
    "freeze": lambda sandbox: sandbox.freeze(),
    "put tree": _put_tree,
    "get tree": _get_tree,
    "get tree to nowhere": _get_tree_nowhere,
    "snapshot": lambda sandbox: sandbox.snapshot(),
}
# May raise OSError: what the inside tells of a path.
OF_FILES = ("read", "write", "put tree", "get tree", "get tree to nowhere")


# What hostile bytes are made of


def numbers() -> st.SearchStrategy[int]:
    return st.one_of(st.just(1), st.just(1), st.sampled_from([0, 2, 3, (1 << 31), (1 << 32) - 1]))


def kinds() -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([*map(int, Answer)]), st.integers(0, 255))


def members() -> st.SearchStrategy[bytes]:
    """A member of a tree's stream, or something like it."""
    odd = st.sampled_from([b"", b"a", b"..", b"../a", b"/etc/passwd", b"a/b", b"a//b"])
    names = st.one_of(st.binary(max_size=20), odd)

    def pack(kind: int, mode: int, mtime: int, path: bytes, target: bytes, lie: int, content: bytes) -> bytes:
        data = struct.pack("!I", len(content)) + content + struct.pack("!I", 0) if kind == 1 else b""
        return MEMBER.pack(kind, mode, mtime, (len(path) + lie) & 0xFFFF, len(target)) + path + target + data

    return st.builds(
        pack, st.integers(0, 5), st.integers(0, 0xFFFF), st.integers(-(1 << 63), (1 << 63) - 1), names, names,
        st.sampled_from([0, 0, 0, 1, -1, 5000]), st.binary(max_size=50),
    )


def payloads() -> st.SearchStrategy[bytes]:
    struct_of_done = st.builds(
        wire.DONE.pack, st.integers(-(1 << 31), (1 << 31) - 1), st.integers(0, 255), st.floats(allow_nan=True)
    )
    struct_of_error = st.builds(
        lambda number, text: wire.ERRNO.pack(number) + text,
        st.one_of(st.sampled_from([errno.ENOENT, errno.EIO, errno.EINTR, errno.EAGAIN, 0, -1]),
                  st.integers(-(1 << 31), (1 << 31) - 1)),
        st.binary(max_size=40),
    )
    struct_of_shell = st.builds(
        lambda key, code, cwd, lie, text: wire.SHELL.pack(len(key), code, max(len(cwd) + lie, 0)) + key + cwd + text,
        st.binary(max_size=4), st.integers(0, 255), st.one_of(st.just(b"/"), st.binary(max_size=9)),
        st.sampled_from([0, 0, 1, -1, 1 << 20]), st.binary(max_size=20),
    )
    return st.one_of(
        st.just(b""), st.just(DONE), st.binary(max_size=300), struct_of_done, struct_of_error, struct_of_shell,
        st.lists(members(), max_size=4).map(b"".join),
        st.builds(lambda data, size: data[:size], st.one_of(struct_of_done, struct_of_error), st.integers(0, 12)),
    )


def frames() -> st.SearchStrategy[bytes]:
    whole = st.builds(wire.frame, kinds(), numbers(), payloads())
    lying = st.builds(
        lambda size, kind, number, payload: wire.HEADER.pack(size, kind, number) + payload,
        st.one_of(st.integers(0, 400), st.integers(0, (1 << 32) - 1)), kinds(), numbers(), payloads(),
    )
    cut = st.builds(lambda frame, size: frame[:size], whole, st.integers(0, 40))
    plausible = st.builds(wire.frame, st.sampled_from([*map(int, Answer)]), st.just(1), payloads())
    return st.one_of(plausible, plausible, whole, lying, cut, st.binary(max_size=64))


def streams() -> st.SearchStrategy[bytes]:
    """What a hostile init sends: frames in any order, doubled, cut short, with lies in them."""

    def join(parts: list[bytes], twice: bool, cut: int) -> bytes:
        stream = b"".join(parts) * (2 if twice else 1)
        return stream[: len(stream) - cut] if cut else stream

    return st.builds(
        join, st.lists(frames(), max_size=6), st.booleans(), st.one_of(st.just(0), st.integers(0, 30))
    )
