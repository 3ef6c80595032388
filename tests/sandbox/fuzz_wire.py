"""A coverage-guided fuzzer for what the owner does with bytes from inside: frames, answers and trees.

    python tests/sandbox/fuzz_wire.py -max_total_time=60 -max_len=4096 CORPUS

Needs `atheris`, which test_wire_fuzz.py installs for itself. An input is a byte that picks the request, then what an
init sends before it closes its end. Every request must end with a value, `SandboxGone` or, where it is about a path,
`OSError`; anything else is a crash, which libFuzzer prints with the input.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found,unused-ignore]

with atheris.instrument_imports(include=["skyrl_minisandbox.sandbox"]):
    from skyrl_minisandbox.errors import MachineError, SandboxError
    from skyrl_minisandbox.sandbox import transfer, wire
    from skyrl_minisandbox.sandbox.box import Box
    from skyrl_minisandbox.sandbox.state import ShellState
    from skyrl_minisandbox.sandbox.wire import Answer, Ask

WORK = tempfile.mkdtemp(prefix="minisandbox-tests-fuzz-")
SOURCE, TARGET = Path(WORK, "source"), Path(WORK, "target")


class Launcher:
    """What a box asks its launcher, without one: there is no sandbox here, only its wire."""

    owner_pid = os.getpid()

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ask(self, verb: str, fds: tuple[int, ...] = (), timeout: float | None = None, **_: Any) -> Any:
        if verb == "create":
            return {"box": 1, "pid": 1, "oom": None}, [self._fd]
        return {"why": ""}, []

    def adopt(self, box: Box) -> None:
        pass


def run(box: Box) -> None:
    box.result(box.send(Ask.RUN, {"timeout": 5}), 5)


def ready(box: Box) -> None:
    try:
        box.ready()
    except MachineError:
        pass  # a private /proc is forbidden here


def halt(box: Box) -> None:
    """As `Sandbox._halt` reads it."""
    request = box.send(Ask.HALT, {})
    while True:
        kind, payload = box.answer(request)
        if kind == Answer.SHELL:
            try:
                ShellState.unpack(payload)
            except ValueError as error:
                box.broken(str(error))
        elif kind != Answer.ENDED:
            return


def open_up(directory: Path) -> None:
    """So that a plain user can remove it, whatever modes came along."""
    directory.chmod(0o700)
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            open_up(entry)


def get(box: Box) -> None:
    try:
        transfer.get_tree(box, "/testbed", TARGET, 1 << 16, 50)
    finally:
        if TARGET.is_dir() and not TARGET.is_symlink():
            open_up(TARGET)
            shutil.rmtree(TARGET, ignore_errors=True)
        elif os.path.lexists(TARGET):
            TARGET.unlink()
        assert os.listdir(WORK) == ["source"], "a tree left its place"


# The request, and whether it may raise OSError.
REQUESTS: list[tuple[Callable[[Box], object], bool]] = [
    (run, False), (ready, False), (halt, False), (get, True),
    (lambda box: transfer.read_file(box, "/a", 1 << 16), True),
    (lambda box: transfer.write_file(box, "/a", b"x", 0o644), True),
    (lambda box: transfer.put_tree(box, SOURCE, "/a"), True),
]


def one(data: bytes) -> None:
    """One input."""
    if not data:
        return
    ours, theirs = socket.socketpair()
    with theirs:
        box = Box(Launcher(ours.detach()), {"limits": {"disk": 0, "memory": 0, "inodes": 0}}, 1 << 16)  # type: ignore[arg-type]
        try:
            theirs.sendall(data[1:])
            theirs.shutdown(socket.SHUT_WR)
            request, of_path = REQUESTS[data[0] % len(REQUESTS)]
            try:
                request(box)
            except SandboxError:
                pass
            except OSError:
                if not of_path:
                    raise
        finally:
            box.hang_up()


def seeds(corpus: Path) -> None:
    """An honest answer to each request."""
    member = struct.Struct("!BHqHH")
    tree = member.pack(2, 0o755, 0, 0, 0) + member.pack(1, 0o644, 0, 1, 0) + b"a" + b"\0\0\0\1x\0\0\0\0"
    tree += member.pack(3, 0o777, 0, 1, 2) + b"b.."
    done = wire.frame(Answer.DONE, 1, wire.DONE.pack(0, 0, 0.5) + b"notice")
    shell = wire.SHELL.pack(2, 0, 1) + b"s1/export A=1"
    answers = [
        wire.frame(Answer.STDOUT, 1, b"out") + wire.frame(Answer.STDERR, 1, b"err") + done,
        wire.frame(Answer.READY, 0, b"proc"),
        wire.frame(Answer.SHELL, 1, shell) + wire.frame(Answer.ENDED, 1, b"sleep 1") + done,
        wire.frame(Answer.BYTES, 1, tree) + done,
        wire.frame(Answer.BYTES, 1, b"content") + done,
        wire.frame(Answer.ERROR, 1, wire.ERRNO.pack(2) + b"No such file"),
        wire.frame(Answer.BYTES, 1, b"fifo") + done,
    ]
    for number, answer in enumerate(answers):
        (corpus / f"seed{number}").write_bytes(bytes([number]) + answer)
    (corpus / "failed").write_bytes(b"\1" + wire.frame(Answer.FAILED, 0, wire.ERRNO.pack(1) + b"proc at /proc"))


def main() -> None:
    SOURCE.mkdir()
    (SOURCE / "file").write_bytes(b"x")
    if os.path.isdir(sys.argv[-1]):
        seeds(Path(sys.argv[-1]))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
