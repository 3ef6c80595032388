"""Files and trees in and out of a box, from the owner's side: through its init, never by a path of this machine."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

from skyrl_minisandbox.sandbox import tree, wire
from skyrl_minisandbox.sandbox.box import Box
from skyrl_minisandbox.sandbox.wire import Answer, Ask

MOST_BYTES = 16 << 30
MOST_MEMBERS = 4_000_000
"""What a tree may have, unless somebody says otherwise."""
_FRAMING = 1 << 14  # more than a member with its names takes on the wire, and the lengths of its pieces


def read_file(box: Box, path: str, limit: int) -> bytes:
    """See `Sandbox.read_file`."""
    request = box.send(Ask.READ, {"path": path, "limit": limit})
    data = bytearray()
    while True:
        kind, payload = box.answer(request)
        if kind == Answer.BYTES:
            data += payload
            if len(data) > limit:
                box.broken("it sent more of a file than was asked for")
        elif kind == Answer.DONE:
            return bytes(data)
        else:
            raise box.os_error(kind, payload, path)


def write_file(box: Box, path: str, data: bytes, mode: int) -> None:
    """See `Sandbox.write_file`."""
    request = box.send(Ask.WRITE, {"path": path, "mode": mode})
    box.send_data(request, data)
    box.done(request, path)


def put_tree(box: Box, source: Path, target: str) -> list[str]:
    """See `Sandbox.put_tree`."""
    pieces = tree.pack(os.fspath(source), max_bytes=MOST_BYTES, max_members=MOST_MEMBERS)
    first = next(pieces)  # what cannot be read at all is told before anything is sent
    request = box.send(Ask.PUT, {"path": target})
    failed: OSError | None = None
    sent = told = 0
    try:
        for piece in tree.gathered(itertools.chain([first], pieces), wire.CHUNK):
            sent += len(piece)
            box.send_piece(request, piece)
    except OSError as error:
        failed = error
    box.send_piece(request, b"")
    left_out: list[str] = []
    while True:
        kind, payload = box.answer(request)
        told += len(payload)
        if kind == Answer.BYTES and told <= sent:  # a name of those that were sent
            left_out.append(os.fsdecode(payload))
        elif failed is not None and kind in (Answer.DONE, Answer.ERROR):
            raise failed
        elif kind == Answer.DONE:
            return left_out
        else:
            raise box.os_error(kind, payload, target)


def get_tree(box: Box, path: str, target: Path, max_bytes: int, max_members: int) -> list[str]:
    """See `Sandbox.get_tree`."""
    failed: OSError | None = None
    left = max_bytes + _FRAMING * (max_members + 1 + max_bytes // tree.PIECE)  # of what is thrown away
    with contextlib.closing(
        tree.Unpacker(os.fspath(target), max_bytes=max_bytes, max_members=max_members)
    ) as unpacker:
        request = box.send(Ask.GET, {"path": path, "max_bytes": max_bytes, "max_members": max_members})
        while True:
            kind, payload = box.answer(request)
            if kind not in (Answer.BYTES, Answer.DONE):
                raise box.os_error(kind, payload, path)
            try:
                left -= len(payload)
                if left < 0:
                    box.broken("it sent more of a tree than was asked for")
                if failed is None and kind == Answer.BYTES:
                    unpacker.feed(payload)
                elif failed is None:
                    unpacker.finish()
                    return unpacker.left_out
            except tree.BadStream as error:
                box.broken(f"what it sent is no tree: {error}")
            except OSError as error:  # a full disk here: the rest is read and thrown away
                failed = error
            if failed is not None and kind == Answer.DONE:
                raise failed
