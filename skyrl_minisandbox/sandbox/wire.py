"""The wire between the owner and a sandbox's init: length-bounded binary frames, never pickle.

Towards init a frame's payload may be JSON, for the owner is trusted. What comes from init is fixed structs and
bytes: every byte from inside is hostile, and there is no parser to be fooled.

    frame = length (u32) | type (u8) | request id (u32) | payload (length bytes, at most MAX_PAYLOAD)
"""

from __future__ import annotations

import enum
import struct

HEADER = struct.Struct("!IBI")
MAX_PAYLOAD = 1 << 20
CHUNK = 1 << 18


class Ask(enum.IntEnum):
    """From the owner to init."""

    RUN = 1  # JSON: argv, env, cwd, user, timeout, input (bool)
    DATA = 2  # bytes of standard input or of a file; empty: the end
    SHELL = 3  # JSON: shell, command, timeout, env, cwd, user; with size the command follows as DATA
    READ = 4  # JSON: path, limit
    WRITE = 5  # JSON: path, mode; DATA frames follow
    FREEZE = 6  # kill every process but init
    HALT = 7  # kill every process but init, and tell what the shells hold: SHELL and ENDED frames, DONE
    GET = 8  # JSON: path, max_bytes, max_members; answered by a stream of tree.py in BYTES frames
    PUT = 9  # JSON: path; such a stream follows as DATA; answered by BYTES frames, a name that was left out each


class Answer(enum.IntEnum):
    """From init to the owner."""

    READY = 64  # init verified what was asked for
    FAILED = 65  # setting up failed: errno (i32), then the step as UTF-8
    STDOUT = 66  # bytes of the command's output
    STDERR = 67
    DONE = 68  # DONE struct, then a notice as UTF-8
    BYTES = 69  # bytes of a file
    ERROR = 70  # errno (i32), then a message as UTF-8
    SHELL = 71  # what a shell goes on with, see state.py
    ENDED = 72  # the command line of a process that was ended


# exit code, flags, seconds
DONE = struct.Struct("!iBd")
ERRNO = struct.Struct("!i")

# A shell: length of its key, its last exit code, length of its directory; key, directory and what it exports as bash
# text follow.
SHELL = struct.Struct("!HBI")
LARGEST_STATE = 900_000  # bytes of it; beyond that (nobody's functions are) a shell starts with its first environment
MOST_ENDED = 100  # command lines of ended processes that are told

TIMED_OUT = 1
TRUNCATED = 2
DISK_FULL = 4


def frame(kind: int, request: int, payload: bytes = b"") -> bytes:
    """One frame. The payload must fit."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes; a frame takes {MAX_PAYLOAD}")
    return HEADER.pack(len(payload), kind, request) + payload


class ProtocolError(Exception):
    """What came over the wire is no frame of ours."""


class FrameReader:
    """Cuts a byte stream into frames. Memory is bounded by one frame: an oversized header is refused at once."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Take bytes, return the frames that are whole: (type, request, payload). Raises `ProtocolError`."""
        self._buffer += data
        frames: list[tuple[int, int, bytes]] = []
        while len(self._buffer) >= HEADER.size:
            length, kind, request = HEADER.unpack_from(self._buffer)
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"a frame of {length} bytes was announced; the limit is {MAX_PAYLOAD}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append((kind, request, bytes(self._buffer[HEADER.size : end])))
            del self._buffer[:end]
        return frames
