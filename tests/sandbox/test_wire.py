"""Every byte from inside is hostile."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec, wire
from skyrl_minisandbox.sandbox.wire import Answer


def forged(spec: SandboxSpec, *frames: bytes, close: bool = True) -> Sandbox:
    """A real sandbox whose socket is taken over by a stand-in that sends `frames`."""
    sandbox = Sandbox(spec)
    ours, theirs = socket.socketpair()
    sandbox._box._sock.close()
    sandbox._box._sock = ours
    for frame in frames:
        theirs.sendall(frame)
    if close:
        theirs.shutdown(socket.SHUT_WR)
    sandbox._keep = theirs  # type: ignore[attr-defined]
    return sandbox


DONE = wire.DONE.pack(0, 0, 0.0)


@pytest.mark.parametrize(
    "frames",
    [
        [wire.frame(Answer.DONE, 99, DONE)],
        [wire.frame(Answer.READY, 1)],
        [wire.frame(200, 1, b"x")],
        [wire.frame(Answer.DONE, 1, b"\0")],
        [struct.pack("!IBI", 1 << 30, Answer.STDOUT, 1)],
        [struct.pack("!IBI", (1 << 32) - 1, Answer.STDOUT, 1)],
        [wire.frame(Answer.STDOUT, 1, b"x" * 100)[:50]],
        [b"\x80\x04cos\nsystem\n" * 10],
        [],
    ],
    ids=["another request", "ready twice", "unknown type", "short", "1 GiB", "4 GiB", "cut short", "pickle", "EOF"],
)
def test_a_forged_frame_ends_only_this_sandbox(spec: SandboxSpec, sandbox: Sandbox, frames: list[bytes]) -> None:
    evil = forged(spec, *frames)
    with pytest.raises(SandboxGone):
        evil.run(["true"], timeout=5)
    evil.close()
    assert sandbox.run("echo on").output == "on\n"


def test_output_without_end_is_cut_off(spec: SandboxSpec) -> None:
    frames = [wire.frame(Answer.STDOUT, 1, b"x" * wire.MAX_PAYLOAD)]
    evil = Sandbox(spec)
    ours, theirs = socket.socketpair()
    evil._box._sock.close()
    evil._box._sock = ours
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(1000):
                theirs.sendall(frames[0])
        finally:
            os._exit(0)
    theirs.close()
    with pytest.raises(SandboxGone, match="more output than its limit"):
        evil.run(["true"], timeout=10)
    evil.close()
    os.waitpid(pid, 0)


def test_frames_come_out_as_they_went_in_however_they_are_cut() -> None:
    stream = b"".join(wire.frame(kind, kind, bytes([kind]) * kind) for kind in range(1, 60))
    for step in (1, 7, 1000, len(stream)):
        reader = wire.FrameReader()
        found = [f for start in range(0, len(stream), step) for f in reader.feed(stream[start : start + step])]
        assert found == [(kind, kind, bytes([kind]) * kind) for kind in range(1, 60)]
