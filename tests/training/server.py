"""What SkyRL's client takes for a vLLM server: HTTP, tokens in and tokens out, answers from a list instead of a model.

    python -m tests.training.server MODEL_DIRECTORY ADDRESS_FILE '["echo hello", "submit"]'

The n-th answer of a conversation is the n-th of the list, its last one ever after. It needs a tokenizer and so runs
where transformers is (`tests.skyrl.environment.trainer_python`). ADDRESS_FILE is there once it serves.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOGPROB = -0.25
"""Of every token; only that it is a number matters here."""

PLAIN: dict[str, Any] = {
    "/get_world_size": {"world_size": 1},
    "/is_sleeping": {"is_sleeping": False},
}


class Engine(ThreadingHTTPServer):
    """seconds: what one answer takes."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, model: str, answers: list[str], seconds: float = 0.0) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.answers = answers
        self.seconds = seconds
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, prompt: list[int]) -> list[int]:
        turn = self.tokenizer.decode(prompt).count("<|im_start|>assistant")
        text = self.answers[min(turn, len(self.answers)) - 1]
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path == "/inference/v1/generate":
            tokens = self.server.answer(json.loads(body)["token_ids"])
            time.sleep(self.server.seconds)
            content = [{"logprob": LOGPROB} for _ in tokens]
            choice = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "stop"}
            self._reply({"choices": [choice]})
        elif path == "/detokenize":
            self._reply({"prompt": self.server.tokenizer.decode(json.loads(body)["tokens"])})
        else:
            self._reply(PLAIN.get(path, {}))

    do_GET = do_POST

    def _reply(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main(model: str, address: str, answers: str, seconds: str = "0") -> None:
    engine = Engine(model, json.loads(answers), float(seconds))
    aside = Path(f"{address}.{os.getpid()}")
    aside.write_text(engine.url)
    aside.rename(address)
    engine.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
