"""Calls to a node's actor, through a real Ray actor: each answer finds its call, and many share a message."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox import channel
from skyrl_minisandbox.channel import EXCHANGES, UNDER_WAY, Callee, Caller
from skyrl_minisandbox.config import make_config
from skyrl_minisandbox.errors import OutOfMemory
from skyrl_minisandbox.own_ray import RayConnection
from tests.support import needs, seconds

pytestmark = [pytest.mark.ci, needs("ray")]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    found = RayConnection(make_config({"images": {"cache": str(tmp_path_factory.mktemp("cache"))}}))
    yield
    found.close()


@pytest.fixture
def actor(connection: None) -> Iterator[Any]:
    import ray

    class Echo:  # defined here, so that Ray takes it along by value
        def __init__(self) -> None:
            self._callee = Callee(self.echo, self.never, self.fail)
            self._lock = threading.Lock()
            self.exchanges = self.most = self._now = 0

        def exchange(self, data: bytes) -> bytes:
            with self._lock:
                self.exchanges += 1
                self._now += 1
                self.most = max(self.most, self._now)
            try:
                return self._callee.exchange(data)
            finally:
                with self._lock:
                    self._now -= 1

        def echo(self, word: Any, pause: float = 0.0) -> Future[Any]:
            said: Future[Any] = Future()
            if pause:
                threading.Timer(pause, said.set_result, [word]).start()
            else:
                said.set_result(word)
            return said

        def never(self) -> Future[None]:
            return Future()

        def fail(self, ours: bool, later: bool) -> Future[None]:
            error = OutOfMemory("no memory", hint="buy some") if ours else KeyError("a fault")
            if not later:
                raise error
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

        def keep(self, seconds: float) -> None:
            channel.KEPT = seconds

        def counts(self) -> tuple[int, int]:
            return self.exchanges, self.most

    made = ray.remote(Echo).options(num_cpus=0, max_concurrency=EXCHANGES).remote()
    ray.get(made.counts.remote())
    yield made
    ray.kill(made)


def counts(actor: Any) -> tuple[int, int]:
    import ray

    found: tuple[int, int] = ray.get(actor.counts.remote())
    return found


def test_one_caller_at_a_time_makes_an_exchange_a_call(actor: Any) -> None:
    caller = Caller(actor)
    assert [caller.call("echo", number).result(seconds(30)) for number in range(10)] == list(range(10))
    assert counts(actor) == (10, 1)


def test_many_at_once_each_get_their_own_answer_in_few_messages(actor: Any) -> None:
    caller = Caller(actor)
    caller.call("echo", "warm").result(seconds(30))

    def one(number: int) -> list[Any]:
        return [caller.call("echo", (number, turn), 0.001 * (number % 3)).result(seconds(60)) for turn in range(10)]

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(one, range(32))) == [[(n, turn) for turn in range(10)] for n in range(32)]
    exchanges, most = counts(actor)
    assert exchanges < 320
    assert most <= UNDER_WAY
    assert caller._calls == {} and caller._waiting == []


def test_one_that_is_never_answered_keeps_nobody_waiting(actor: Any) -> None:
    caller = Caller(actor)
    never = [caller.call("never") for _ in range(3)]
    for number in range(20):
        assert caller.call("echo", number).result(seconds(30)) == number
    assert not any(each.done() for each in never)
    deadline = time.monotonic() + seconds(30)
    late = caller.call("echo", "late", 0.3)  # asked for before, answered with nothing else under way
    assert late.result(deadline - time.monotonic()) == "late"


def test_who_is_kept_for_too_long_comes_again_and_is_answered(actor: Any) -> None:
    import ray

    ray.get(actor.keep.remote(0.05))
    assert Caller(actor).call("echo", "late", 1.0).result(seconds(30)) == "late"
    exchanges, most = counts(actor)
    assert exchanges > 3 and most == 1


def test_two_drivers_of_one_actor_get_their_own(actor: Any) -> None:
    callers = [Caller(actor), Caller(actor)]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def run(which: int) -> None:
        for turn in range(20):
            found[which].append(callers[which].call("echo", (which, turn), 0.002).result(seconds(30)))

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds(60))
    assert found == {which: [(which, turn) for turn in range(20)] for which in (0, 1)}


@pytest.mark.parametrize("later", [False, True])
def test_our_errors_come_as_they_are_and_others_as_text(actor: Any, later: bool) -> None:
    caller = Caller(actor)
    with pytest.raises(OutOfMemory, match="no memory") as ours:
        caller.call("fail", True, later).result(seconds(30))
    assert ours.value.hint == "buy some"
    with pytest.raises(RuntimeError, match="KeyError: 'a fault'"):
        caller.call("fail", False, later).result(seconds(30))
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        caller.call("nothing").result(seconds(30))


def test_when_the_actor_is_gone_every_call_says_so(actor: Any) -> None:
    import ray

    caller = Caller(actor)
    never = caller.call("never")
    assert caller.call("echo", 1).result(seconds(30)) == 1
    ray.kill(actor)
    with pytest.raises(ray.exceptions.RayActorError):
        never.result(seconds(60))
    with pytest.raises(ray.exceptions.RayActorError):
        caller.call("echo", 2).result(seconds(60))


def test_what_cannot_be_sent_fails_only_its_own_call(actor: Any, tmp_path: Path) -> None:
    caller = Caller(actor)
    with (tmp_path / "file").open("w") as file, pytest.raises(TypeError, match="pickle"):
        caller.call("echo", file)
    assert caller.call("echo", 3).result(seconds(30)) == 3


class _Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def test_what_cannot_be_read_fails_only_its_own_call(actor: Any) -> None:
    caller = Caller(actor)
    never = caller.call("never")
    with pytest.raises(RuntimeError, match="invalid literal"):
        caller.call("echo", _Unreadable()).result(seconds(30))
    assert caller.call("echo", 4).result(seconds(30)) == 4
    assert not never.done()
