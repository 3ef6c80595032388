from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import InputError, PluginError, PolicyError
from skyrl_minisandbox.policies import InvertedPolicy, load_policy
from skyrl_minisandbox.policies.script import load_script, scripted_tasks
from tests.policies.server import Reply, scripted_server

ASK = [{"role": "user", "content": "question"}]


class OwnPolicy:
    def __init__(self, *, word: str, task_id: str) -> None:
        self.text = f"{word} {task_id}"

    def query(self, messages: list[dict[str, str]]) -> str:
        return self.text


def test_a_policy_is_named_shortly_or_by_a_dotted_path() -> None:
    assert isinstance(load_policy("inverted"), InvertedPolicy)
    own = load_policy(f"{__name__}.OwnPolicy", task_id="t", word="hello")
    assert own.query(ASK) == "hello t"


def test_an_unknown_policy_lists_the_known() -> None:
    with pytest.raises(PluginError, match="inverted, openai, script"):
        load_policy("gpt")


def test_an_unknown_key_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"no key `pth`; known: path, task_id"):
        load_policy("script", pth="x")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="needs the key `base_url`"):
        load_policy("openai", model="m")


class TestScript:
    def test_gives_the_texts_of_its_task_in_order_and_then_says_that_it_ended(self, tmp_path: Path) -> None:
        file = tmp_path / "script.json"
        file.write_text(json.dumps({"one": ["a", "b"], "two": ["c"]}))
        policy = load_policy("script", task_id="one", path=str(file))
        assert [policy.query(ASK), policy.query(ASK)] == ["a", "b"]
        with pytest.raises(PolicyError, match="has ended: 2 texts for task `one`"):
            policy.query(ASK)

    def test_a_plain_list_is_for_every_task(self, tmp_path: Path) -> None:
        file = tmp_path / "script.json"
        file.write_text('["a"]')
        assert load_policy("script", task_id="any", path=str(file)).query(ASK) == "a"

    def test_a_task_without_texts_lists_those_that_have_some(self, tmp_path: Path) -> None:
        file = tmp_path / "script.json"
        file.write_text('{"one": []}')
        with pytest.raises(InputError, match="no texts for task `two`; it has: one"):
            load_policy("script", task_id="two", path=str(file))

    @pytest.mark.parametrize("content", ["{", '{"t": "text"}', "[1]", "3"])
    def test_another_shape_is_refused(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "script.json"
        file.write_text(content)
        with pytest.raises(InputError):
            load_policy("script", task_id="t", path=str(file))

    def test_a_missing_file_is_named(self) -> None:
        with pytest.raises(InputError, match=r"cannot read the script `nowhere\.json`"):
            load_policy("script", path="nowhere.json")

    def test_the_recording_that_comes_with_the_package_has_three_tasks_and_submits(self) -> None:
        assert len(scripted_tasks("pypi")) >= 3
        for texts in load_script("pypi").values():
            assert "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT" in texts[-1]


class TestOpenAI:
    def test_sends_the_conversation_and_returns_the_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OWN_KEY", "secret-value")
        with scripted_server([Reply("answer")]) as server:
            policy = load_policy(
                "openai",
                base_url=server.base_url + "/",
                model="m",
                api_key_env="OWN_KEY",
                temperature=0.5,
                max_tokens=7,
                seed=3,
                task_id="t",
            )
            assert policy.query([{**ASK[0], "extra": "not for the endpoint"}]) == "answer"
        assert server.requests == [{"model": "m", "messages": ASK, "max_tokens": 7, "temperature": 0.5, "seed": 3}]
        assert server.headers[0]["Authorization"] == "Bearer secret-value"

    def test_without_a_key_none_is_sent(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login user password other-secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with scripted_server([Reply("answer")]) as server:
            load_policy("openai", base_url=server.base_url, model="m").query(ASK)
        assert "Authorization" not in server.headers[0]

    @pytest.mark.parametrize(
        "passing",
        [Reply(status=429, headers={"Retry-After": "0.01"}), Reply(status=503), Reply(hang_up=True)],
        ids=["429", "503", "hang-up"],
    )
    def test_what_may_pass_is_tried_again(self, passing: Reply) -> None:
        with scripted_server([passing, Reply("answer")]) as server:
            policy = load_policy("openai", base_url=server.base_url, model="m", retries=1)
            assert policy.query(ASK) == "answer"
        assert len(server.requests) == 2

    def test_what_will_not_pass_is_not_tried_again(self) -> None:
        with scripted_server([Reply(status=400, body=b'{"error": "context too long"}')]) as server:
            policy = load_policy("openai", base_url=server.base_url, model="m")
            with pytest.raises(PolicyError, match=r"HTTP 400: .*context too long"):
                policy.query(ASK)
        assert len(server.requests) == 1

    def test_retries_are_bounded(self) -> None:
        with scripted_server([Reply(status=500, body=b"broken")]) as server:
            policy = load_policy("openai", base_url=server.base_url, model="m", retries=1)
            with pytest.raises(PolicyError, match="HTTP 500: broken"):
                policy.query(ASK)
        assert len(server.requests) == 2

    def test_an_endpoint_that_is_down_is_named_with_a_hint_and_without_the_key(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "secret-value")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        policy = load_policy("openai", base_url=url, model="m", retries=0)
        with pytest.raises(PolicyError) as caught:
            policy.query(ASK)
        text = caught.value.render()
        assert f"{url}/chat/completions does not answer for model `m`: Connection refused" in text
        assert f"hint: curl {url}/models" in text
        assert "secret-value" not in text

    @pytest.mark.parametrize("status", [401, 200])
    def test_a_key_that_the_endpoint_repeats_is_not_shown(self, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "secret-value\n")  # as a file gives it
        with scripted_server([Reply(status=status, body=b"no such key: secret-value")]) as server:
            policy = load_policy("openai", base_url=server.base_url, model="m")
            with pytest.raises(PolicyError, match=r"no such key: \*\*\*") as caught:
                policy.query(ASK)
        assert "secret-value" not in caught.value.render()

    def test_a_key_that_no_header_can_hold_is_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "secret\nvalue")
        policy = load_policy("openai", base_url="http://127.0.0.1:9/v1", model="m", retries=0)
        with pytest.raises(InputError, match="OPENAI_API_KEY holds characters") as caught:
            policy.query(ASK)
        assert "secret" not in caught.value.render()

    def test_an_endpoint_that_accepts_and_says_nothing_ends_by_the_deadline(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            policy = load_policy("openai", base_url=url, model="m", timeout=30.0, deadline=0.2)
            with pytest.raises(PolicyError):
                policy.query(ASK)

    def test_an_endpoint_that_sends_a_byte_now_and_then_ends_by_the_deadline(self) -> None:
        ended = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def drip() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                    while not ended.wait(0.05):
                        try:
                            connection.sendall(b" ")
                        except OSError:
                            return

            thread = threading.Thread(target=drip, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            policy = load_policy("openai", base_url=url, model="m", deadline=0.5, retries=0)
            try:
                with pytest.raises(PolicyError):
                    policy.query(ASK)
            finally:
                ended.set()
                thread.join(10)

    @pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b"[]"])
    def test_an_answer_of_another_shape_is_told(self, body: bytes) -> None:
        with scripted_server([Reply(body=body)]) as server:
            policy = load_policy("openai", base_url=server.base_url, model="m")
            with pytest.raises(PolicyError, match="another shape"):
                policy.query(ASK)

    def test_no_content_is_an_empty_text(self) -> None:
        body = b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'
        with scripted_server([Reply(body=body)]) as server:
            policy = load_policy("openai", base_url=server.base_url, model="m")
            assert policy.query(ASK) == ""
            assert policy.finish_reason == "length"

    def test_a_base_url_that_is_none_is_refused(self) -> None:
        with pytest.raises(InputError, match="not a URL"):
            load_policy("openai", base_url="localhost:8000", model="m")
