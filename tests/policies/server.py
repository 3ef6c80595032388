"""A small OpenAI-compatible server that answers from a script; it keeps what it was asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Reply:
    """One scripted answer: a text, or another status and body."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    hang_up: bool = False  # close the connection without an answer


class ScriptedServer(ThreadingHTTPServer):
    """`POST /v1/chat/completions`. Replies come in order; the last one repeats.

    With `by_turn` the reply is chosen by how many assistant messages the conversation has, so that any
    number of conversations can go on at once.
    """

    daemon_threads = True

    def __init__(self, replies: Sequence[Reply], *, by_turn: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = list(replies)
        self.by_turn = by_turn
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_reply(self, request: dict[str, Any]) -> Reply:
        turn = sum(m["role"] == "assistant" for m in request["messages"])
        index = turn if self.by_turn else len(self.requests) - 1
        return self.replies[min(index, len(self.replies) - 1)]


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.headers.append(dict(self.headers))
            reply = self.server.next_reply(request)
        if reply.hang_up:
            self.close_connection = True
            return
        body = reply.body
        if body is None:
            message = {"role": "assistant", "content": reply.text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(404 if self.path != "/v1/chat/completions" else reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def scripted_server(replies: Sequence[Reply], *, by_turn: bool = False) -> Iterator[ScriptedServer]:
    """A running server on a free port of 127.0.0.1, ended with the block."""
    server = ScriptedServer(replies, by_turn=by_turn)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
