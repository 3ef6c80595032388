"""What init tells its owner: frames, and streams that go out as fast as the owner takes them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from skyrl_minisandbox.sandbox import wire
from skyrl_minisandbox.sandbox.wire import Answer

_WINDOW = 1 << 20  # what may wait to be sent before a stream waits too, bytes


class Answers:
    """The sending half of init's socket, which does not block. When the owner is gone, so is this process."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outgoing = bytearray()
        self._streams: dict[int, Iterator[bytes]] = {}  # by request

    @property
    def waiting(self) -> bool:
        """Whether there is something to send as soon as the socket takes it."""
        return bool(self._outgoing or self._streams)

    def send(self, kind: Answer, request: int, payload: bytes = b"") -> None:
        """Send a frame, or have it wait."""
        self.hold(kind, request, payload)
        self._flush()

    def hold(self, kind: Answer, request: int, payload: bytes) -> None:
        """Send a frame together with the next one, which is on its way: its owner is woken once."""
        self._outgoing += wire.frame(kind, request, payload)
        if len(self._outgoing) > _WINDOW:
            self._flush()

    def done(self, request: int) -> None:
        """The plain end of what is no command."""
        self.send(Answer.DONE, request, wire.DONE.pack(0, 0, 0.0))

    def error(self, request: int, error: OSError) -> None:
        text = (error.strerror or str(error)).encode(errors="replace")[:1000]
        self.send(Answer.ERROR, request, wire.ERRNO.pack(error.errno or errno.EIO) + text)

    def stream(self, request: int, pieces: Iterator[bytes]) -> None:
        """Answer with BYTES frames, and DONE or what `pieces` raises."""
        self._streams[request] = pieces
        self.go_on()

    def go_on(self) -> None:
        """Send what waits, and one piece of each stream: nobody else has to wait for long."""
        self._flush()
        if len(self._outgoing) > _WINDOW:
            return
        for request, pieces in list(self._streams.items()):
            try:
                piece = next(pieces, None)
            except (OSError, ValueError) as error:  # a path with a NUL in it is a ValueError
                del self._streams[request]
                self.error(request, error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error)))
                continue
            if piece is None:
                del self._streams[request]
                self.done(request)
            else:
                self.send(Answer.BYTES, request, piece)

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._sock.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            os._exit(0)
