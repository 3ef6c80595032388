"""x07 to x09: a stand-in at init's end of the socket. Whatever it sends, only its sandbox ends, with a clear error.

The systematic fuzzing of the wire is in tests/sandbox; these are the rows with a name.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import Sandbox, wire
from skyrl_minisandbox.sandbox.client import LauncherClient
from skyrl_minisandbox.sandbox.wire import Answer
from tests.security.conftest import Yard, alive, within

pytestmark = pytest.mark.ci  # the fast tier has the fuzzing of frames in tests/sandbox

MIB = 1 << 20
DONE = wire.DONE.pack(0, 0, 0.0)


class StandIn:
    """A launcher that gives away our end of a sandbox's socket, and answers in init's place once it is ready."""

    def __init__(self, launcher: LauncherClient, answer: Callable[[socket.socket, int], None]) -> None:
        self._launcher, self._answer = launcher, answer
        self.inits: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def ask(self, verb: str, *arguments: Any, **request: Any) -> tuple[dict[str, Any], list[int]]:
        answer, fds = self._launcher.ask(verb, *arguments, **request)
        if verb == "create":
            self.inits.append(answer["pid"])
            owner, ours = socket.socketpair()
            threading.Thread(target=self._serve, args=(socket.socket(fileno=fds[0]), ours), daemon=True).start()
            fds = [owner.detach()]
        return answer, fds

    def _serve(self, init: socket.socket, ours: socket.socket) -> None:
        """Pass on that the real one is ready, wait for a request, then send what the row wants sent."""
        with init, ours:
            reader = wire.FrameReader()
            frames: list[tuple[int, int, bytes]] = []
            while not frames:
                frames = reader.feed(init.recv(1 << 16))
            ours.sendall(wire.frame(*frames[0]))
            reader = wire.FrameReader()
            requests: list[tuple[int, int, bytes]] = []
            while not requests:
                data = ours.recv(1 << 16)
                if not data:
                    return
                requests = reader.feed(data)
            try:
                self._answer(ours, requests[0][1])
            except OSError:
                pass  # nobody listens any more


def sending(*frames: Callable[[int], bytes]) -> Callable[[socket.socket, int], None]:
    """Send these, then EOF; each gets the number of the request."""

    def answer(sock: socket.socket, request: int) -> None:
        for one in frames:
            sock.sendall(one(request))

    return answer


def frame(kind: int, payload: bytes, shift: int = 0) -> Callable[[int], bytes]:
    return lambda request: wire.frame(kind, request + shift, payload)


def raw(data: bytes) -> Callable[[int], bytes]:
    return lambda request: data


# Everything that waits for an answer.
ASKING: dict[str, Callable[[Sandbox, Path], Any]] = {
    "run": lambda sandbox, place: sandbox.run("true", timeout=5),
    "shell": lambda sandbox, place: sandbox.shell().run("true", timeout=5),
    "read_file": lambda sandbox, place: sandbox.read_file("/etc/hostname", limit=100),
    "write_file": lambda sandbox, place: sandbox.write_file("/tmp/x", b"x"),
    "freeze": lambda sandbox, place: sandbox.freeze(),
    "snapshot": lambda sandbox, place: sandbox.snapshot(),
    "get_tree": lambda sandbox, place: sandbox.get_tree("/etc", place / "got", max_bytes=1000, max_members=10),
    "put_tree": lambda sandbox, place: sandbox.put_tree(place / "put", "/tmp/put"),
}


class Bomb:
    """What makes a file on the machine when it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


FORGED: dict[str, Callable[[socket.socket, int], None]] = {
    "the end of another command": sending(frame(Answer.DONE, DONE, 1), frame(Answer.DONE, DONE, -1)),
    "output of another command": sending(frame(Answer.STDOUT, b"forged", 7)),
    "a file that nobody asked for": sending(frame(Answer.BYTES, b"forged" * 100), frame(Answer.SHELL, b"forged")),
    "ready once more": sending(frame(Answer.READY, b""), frame(Answer.READY, b"proc")),
    "an unknown type": sending(frame(0, b""), frame(255, b"forged")),
    "a type of ours": sending(frame(1, b"{}")),
    "an end that is too short": sending(frame(Answer.DONE, b"\0")),
    "an error that is too short": sending(frame(Answer.ERROR, b"\0")),
    "a frame that is cut short": sending(raw(wire.HEADER.pack(1000, Answer.DONE, 1) + b"only this")),
    "a header that is cut short": sending(raw(b"\0\0")),
    "nothing, and the end": sending(),
    "a member that leads elsewhere": sending(
        frame(Answer.BYTES, struct.pack("!BHqHH", 2, 0o755, 0, 0, 0)),
        frame(Answer.BYTES, struct.pack("!BHqHH", 1, 0o644, 0, 13, 0) + b"../../forged1"),
    ),
    "1 GiB announced": sending(raw(struct.pack("!IBI", 1 << 30, Answer.STDOUT, 1)), raw(b"\0" * MIB)),
    "2^32 - 1 announced": sending(raw(b"\xff" * 9), raw(b"\0" * MIB)),
    "2^63 announced": sending(raw(struct.pack("!Q", 1 << 63) + b"\0"), raw(b"\0" * MIB)),
    "-1 announced": sending(raw(struct.pack("!q", -1) + b"\xff"), raw(b"\0" * MIB)),
    "JSON nested 100,000 deep": sending(
        *(frame(kind, b"[" * 100_000) for kind in (Answer.BYTES, Answer.SHELL, Answer.ENDED, Answer.DONE))
    ),
    "a number of 1,000,000 digits": sending(
        *(frame(kind, b"9" * 1_000_000) for kind in (Answer.BYTES, Answer.SHELL, Answer.DONE))
    ),
}

BELIEVED = ("an end that is too short", "JSON nested 100,000 deep", "a number of 1,000,000 digits")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory; nothing of what was forged may be beside what is asked for."""
    (tmp_path / "put").write_text("x")
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"put", "got"}
    assert not (tmp_path.parent / "forged1").exists() and not list(tmp_path.rglob("forged1"))


def hold(yard: Yard, answer: Callable[[socket.socket, int], None], asking: str, place: Path) -> BaseException | Any:
    """Ask a stand-in: what came, once its init is gone. The yard looks for everybody else."""
    launcher = StandIn(yard.launcher, answer)
    sandbox = Sandbox(yard.spec, launcher)  # type: ignore[arg-type]
    try:
        try:
            return within(30, lambda: ASKING[asking](sandbox, place))
        except (SandboxError, OSError) as error:
            assert str(error)
            return error
    finally:
        within(30, sandbox.close)
        assert not any(alive(pid) for pid in launcher.inits)


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_frame_ends_only_its_sandbox(yard: Yard, place: Path, forged: str) -> None:
    """x07, x08, x09: for every request that is waited for."""
    for asking in ASKING:
        came = hold(yard, FORGED[forged], asking, place)
        believed = not isinstance(came, BaseException)
        # Where an end has no word about the command it is an end; digits and brackets in it are a notice.
        assert forged in BELIEVED or not believed, f"{asking}: believed {came!r}"
        if isinstance(came, OSError) and not isinstance(came, SandboxError):
            assert asking in ("read_file", "get_tree", "put_tree", "write_file"), f"{asking}: {came!r}"


def test_a_result_that_comes_twice_is_no_later_commands(yard: Yard) -> None:
    """x07"""
    twice = sending(frame(Answer.DONE, DONE), frame(Answer.STDOUT, b"forged"), frame(Answer.DONE, DONE))
    launcher = StandIn(yard.launcher, twice)
    sandbox = Sandbox(yard.spec, launcher)  # type: ignore[arg-type]
    assert sandbox.run("true").stdout == b""
    with pytest.raises(SandboxError):
        within(30, lambda: sandbox.run("true", timeout=5))
    sandbox.close()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("asking", "kind"),
    [("run", Answer.STDOUT), ("run", Answer.STDERR), ("shell", Answer.STDOUT), ("read_file", Answer.BYTES),
     ("get_tree", Answer.BYTES), ("put_tree", Answer.BYTES), ("snapshot", Answer.ENDED), ("snapshot", Answer.SHELL)],
)
def test_bytes_without_end_are_cut_off(yard: Yard, place: Path, asking: str, kind: int) -> None:
    """x08: whole frames, each of a size that is allowed, for as long as anybody listens."""
    sent = 0

    def flood(sock: socket.socket, request: int) -> None:
        nonlocal sent
        one = wire.frame(kind, request, b"x" * wire.MAX_PAYLOAD)
        while sent < 4096:
            sock.sendall(one)
            sent += 1

    before = _resident()
    came = hold(yard, flood, asking, place)
    assert isinstance(came, SandboxError | OSError)
    assert sent < 200, f"{sent} MiB were taken"
    assert _resident() - before < 128 * MIB


def test_a_pickle_is_never_loaded(yard: Yard, place: Path) -> None:
    """x09: wherever bytes come from inside."""
    target = place.parent / f"{place.name}-pickled"
    payload = pickle.dumps(Bomb(str(target)))
    for kind in (Answer.STDOUT, Answer.BYTES, Answer.ERROR, Answer.DONE, Answer.SHELL, Answer.ENDED, Answer.FAILED):
        for asking in ASKING:
            hold(yard, sending(frame(kind, payload)), asking, place)
            assert not target.exists()
