"""Answers from an OpenAI-compatible endpoint: `POST {base_url}/chat/completions`, nothing else."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import requests
import urllib3

from skyrl_minisandbox.errors import InputError, PolicyError
from skyrl_minisandbox.policies.policy import Message

RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 30.0
LARGEST_ANSWER = 64 << 20


class OpenAIPolicy:
    """One conversation with a chat-completions endpoint (vLLM, SGLang, llama.cpp, OpenAI).

    base_url: up to and without `/chat/completions`, such as `http://localhost:8000/v1`.
    model: the name that the endpoint serves.
    api_key_env: name of the environment variable with the key; unset means no key. The key itself is never
        part of a configuration, a log or an error.
    temperature: None for the endpoint's own default.
    max_tokens: bound of one answer.
    timeout: seconds for one request.
    retries: further attempts after a connection error or a status that may pass (429, 5xx).
    deadline: seconds for one answer with all its attempts.
    seed: sent along, for endpoints that sample by it; None sends none.
    task_id: sent nowhere.

    finish_reason: of the last answer (`stop`, `length`).
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float | None = None,
        max_tokens: int = 4096,
        timeout: float = 300.0,
        retries: int = 4,
        deadline: float = 900.0,
        seed: int | None = None,
        task_id: str = "",
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InputError(
                f"`policy.base_url` is not a URL: {base_url!r}",
                hint="policy.base_url=http://localhost:8000/v1",
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.retries = retries
        self.deadline = deadline
        self.seed = seed
        self.finish_reason = ""
        self._api_key_env = api_key_env
        self._session = requests.Session()

    def query(self, messages: list[Message]) -> str:
        """Return the endpoint's answer. Raises `PolicyError` that names the URL and the last failure."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "max_tokens": self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.seed is not None:
            body["seed"] = self.seed
        end = time.monotonic() + self.deadline
        pause, failure = 0.5, ""
        for attempt in range(self.retries + 1):
            remaining = end - time.monotonic()
            if remaining <= 0:
                break
            try:
                status, retry_after, text = self._post(body, min(self.timeout, remaining))
            except (
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,
            ) as error:
                failure, wait = _reason(error), pause
            except requests.RequestException as error:
                raise self._error(_reason(error)) from None
            else:
                if status == 200:
                    return self._content(text)
                failure = f"HTTP {status}: {_excerpt(self._without_key(text))}"
                if status not in RETRY_STATUS:
                    raise self._error(failure)
                wait = _seconds(retry_after) or pause
            wait = min(wait * random.uniform(1.0, 1.25), LONGEST_PAUSE, max(0.0, end - time.monotonic()))
            if attempt < self.retries:
                # Nothing to wait on: the pause itself is what a busy endpoint asks for.
                time.sleep(wait)
            pause *= 2
        raise self._error(failure or f"no answer within {self.deadline:.0f} s")

    def _post(self, body: dict[str, Any], timeout: float) -> tuple[int, str, str]:
        """Status, `Retry-After` and text of one request that ends within `timeout` seconds in all."""
        end = time.monotonic() + timeout
        with self._session.post(self.url, json=body, auth=self._authorize, timeout=timeout, stream=True) as answer:
            parts, size = [], 0
            # requests' own timeout is per read: an endpoint that sends a byte now and then would hold us.
            for part in _as_it_arrives(answer):
                parts.append(part)
                size += len(part)
                if time.monotonic() > end:
                    raise requests.Timeout(f"the answer was not complete after {timeout:.0f} s")
                if size > LARGEST_ANSWER:
                    raise requests.RequestException(f"the answer is larger than {LARGEST_ANSWER} bytes")
            text = b"".join(parts).decode("utf-8", "replace")
            return answer.status_code, answer.headers.get("Retry-After", ""), text

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Given as `auth`, so that a .netrc entry of the host is not sent instead."""
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _key(self) -> str:
        key = os.environ.get(self._api_key_env, "").strip() if self._api_key_env else ""
        if not (key.isascii() and key.isprintable()):  # the HTTP library would say so with the key in its words
            raise InputError(
                f"{self._api_key_env} holds characters that no key has", hint=f"export {self._api_key_env}=…"
            )
        return key

    def _without_key(self, text: str) -> str:
        """For what is shown and written: endpoints repeat a key that they refuse."""
        key = self._key()
        return text.replace(key, "***") if key else text

    def _content(self, text: str) -> str:
        try:
            choice = json.loads(text)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise self._error(f"an answer of another shape: {_excerpt(self._without_key(text))}") from None
        self.finish_reason = str(choice.get("finish_reason") or "")
        return content if isinstance(content, str) else ""

    def _error(self, failure: str) -> PolicyError:
        return PolicyError(
            f"the endpoint {self.url} does not answer for model `{self.model}`: {self._without_key(failure)}",
            hint=f"curl {self.url.removesuffix('/chat/completions')}/models   (is it up, with this model?)",
        )


def _as_it_arrives(answer: requests.Response) -> Iterator[bytes]:
    """The body in the pieces that the socket gives; urllib3 1.x can only be asked for small ones."""
    if not hasattr(answer.raw, "read1"):
        yield from answer.iter_content(64)
        return
    try:
        while part := answer.raw.read1(1 << 16, decode_content=True):
            yield part
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.Timeout(str(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(str(error)) from error


def _reason(error: requests.RequestException) -> str:
    """The innermost cause, without the address of a connection object."""
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or cause.__cause__ or cause.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return _excerpt(str(cause)) or type(cause).__name__


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "…"


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
