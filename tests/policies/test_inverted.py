from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from skyrl_minisandbox.errors import PolicyError
from skyrl_minisandbox.policies.inverted import InvertedPolicy, Said, compare
from skyrl_minisandbox.policies.policy import Message, PolicyStopped
from skyrl_minisandbox.record import EndedBy

TIMEOUT = 20.0


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Running:
    """A scaffold in a thread of its own, and how it ended."""

    def __init__(self, scaffold: Callable[[InvertedPolicy], object], **config: float) -> None:
        self.policy = InvertedPolicy(**config)
        self.result: object = None
        self.error: BaseException | None = None
        self._scaffold = scaffold
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._scaffold(self.policy)
        except BaseException as error:
            self.error = error
        finally:
            self.policy.end()

    def join(self) -> None:
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(scaffold: Callable[[InvertedPolicy], object], **config: float) -> Running:
        made.append(Running(scaffold, **config))
        return made[-1]

    yield start
    for one in made:
        one.policy.stop()
        one.join()


def conversation(turns: int) -> Callable[[InvertedPolicy], list[Message]]:
    """A scaffold that asks `turns` times and answers every text with an observation."""

    def scaffold(policy: InvertedPolicy) -> list[Message]:
        history = [message("system", "be brief"), message("user", "solve it")]
        for _ in range(turns):
            text = policy.query(history)
            history = [*history, message("assistant", text), message("user", f"saw {text}")]
        return history

    return scaffold


def busy(go_on: threading.Event, word: str) -> Callable[[InvertedPolicy], None]:
    """A scaffold that asks, and after its text asks again only when it may go on."""

    def scaffold(policy: InvertedPolicy) -> None:
        policy.query([message("user", "x")])
        go_on.wait(TIMEOUT)
        policy.query([message("user", "x"), message("assistant", "a"), message("user", word)])

    return scaffold


def test_each_step_gives_what_the_scaffold_added_since_its_last_query(running) -> None:
    one = running(conversation(2))
    assert one.policy.first(TIMEOUT) == [message("system", "be brief"), message("user", "solve it")]
    assert one.policy.answer("a", TIMEOUT) == [message("user", "saw a")]
    assert one.policy.answer("b", TIMEOUT) is None
    one.join()
    assert [m["content"] for m in one.result][2:] == ["a", "saw a", "b", "saw b"]
    assert (one.policy.turns, one.policy.history_divergence) == (2, 0)


def test_a_scaffold_that_never_asks_has_ended_at_first(running) -> None:
    one = running(conversation(0))
    assert one.policy.first(TIMEOUT) is None
    assert one.policy.answer("whatever", TIMEOUT) is None
    assert one.policy.wait_ended(TIMEOUT)
    assert one.policy.turns == 0


def test_a_scaffold_that_raises_has_ended(running) -> None:
    def scaffold(policy: InvertedPolicy) -> None:
        policy.query([message("user", "x")])
        raise ValueError("fault of the scaffold")

    one = running(scaffold)
    one.policy.first(TIMEOUT)
    assert one.policy.answer("a", TIMEOUT) is None
    one.join()
    assert isinstance(one.error, ValueError)


def test_stop_unwinds_a_waiting_scaffold_past_its_own_except(running) -> None:
    swallowed: list[Exception] = []

    def scaffold(policy: InvertedPolicy) -> None:
        while True:
            try:
                policy.query([message("user", "x")])
            except Exception as error:
                swallowed.append(error)

    one = running(scaffold)
    one.policy.first(TIMEOUT)
    one.policy.stop(EndedBy.TIME)
    one.policy.stop(EndedBy.LENGTH)  # the first reason stands
    one.join()
    assert isinstance(one.error, PolicyStopped)
    assert one.error.ended_by is EndedBy.TIME
    assert not swallowed
    assert one.policy.answer("late", TIMEOUT) is None


def test_stop_before_the_first_query_reaches_it(running) -> None:
    begin = threading.Event()

    def scaffold(policy: InvertedPolicy) -> None:
        begin.wait(TIMEOUT)
        policy.query([message("user", "x")])

    one = running(scaffold)
    one.policy.stop()
    begin.set()
    one.join()
    assert isinstance(one.error, PolicyStopped)


def test_a_scaffold_that_is_busy_is_a_timeout_and_can_be_waited_for_again(running) -> None:
    go_on = threading.Event()
    one = running(busy(go_on, "late"))
    one.policy.first(TIMEOUT)
    with pytest.raises(TimeoutError):
        one.policy.answer("a", 0.05)
    go_on.set()
    assert one.policy.first(TIMEOUT) == [message("user", "late")]


def test_a_driver_that_is_gone_is_a_policy_error(running) -> None:
    one = running(conversation(1), patience=0.05)
    one.join()
    assert isinstance(one.error, PolicyError)
    assert "0 s" in one.error.message


def test_answering_twice_without_a_query_between_is_refused(running) -> None:
    policy = InvertedPolicy()
    with pytest.raises(RuntimeError, match="without a query"):
        policy.answer("a", TIMEOUT)


def test_many_conversations_at_once_keep_to_themselves() -> None:
    def play(index: int) -> int:
        one = Running(conversation(20))
        assert one.policy.first(TIMEOUT) is not None
        for turn in range(19):
            assert one.policy.answer(f"{index}.{turn}", TIMEOUT) == [message("user", f"saw {index}.{turn}")]
        assert one.policy.answer("last", TIMEOUT) is None
        return one.policy.turns

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(play, range(64))) == [20] * 64


S, U, N, E = message("system", "s"), message("user", "u"), message("user", "o"), message("user", "e")
A, B = message("assistant", "a"), message("assistant", "b")


@pytest.mark.parametrize(
    ("seen", "history", "added", "lost"),
    [
        ([], [S, U], [S, U], 0),
        ([S, U, A], [S, U, A, N], [N], 0),
        ([S, U, A], [S, U, A], [], 0),
        ([S, U, A], [S, U, N], [N], 1),  # the answer was not kept (a format error)
        ([S, U, A], [S, U, message("assistant", "a "), N], [N], 1),  # or rewritten
        ([S, U, A], [S, U], [], 1),
        ([S, U, A], [S, message("user", "shorter"), A, N], [N], 1),  # a message was rewritten
        ([S, U, A, N, B], [S, N, B, E], [E], 2),  # old messages were dropped
        ([S, U, E, B], [S, U, E, E], [E], 1),  # the same error twice: the second one is new
        ([S, U, A], [S, U, A, message("assistant", "own words"), N], [N], 0),
    ],
)
def test_what_is_new_and_what_was_lost(
    seen: list[Message], history: list[Message], added: list[Message], lost: int
) -> None:
    assert compare(Said(seen), Said(history)) == (added, lost)


def test_a_lost_answer_is_counted_as_divergence(running) -> None:
    def scaffold(policy: InvertedPolicy) -> None:
        policy.query([U])
        policy.query([U, N])

    one = running(scaffold)
    one.policy.first(TIMEOUT)
    assert one.policy.answer("not kept", TIMEOUT) == [N]
    assert one.policy.history_divergence == 1


Told = queue.SimpleQueue


def test_a_text_can_be_given_without_waiting_for_what_comes_of_it(running) -> None:
    one = running(conversation(2))
    one.policy.first(TIMEOUT)
    told: Told[list[Message] | None] = Told()
    threads: list[threading.Thread] = []

    def then(added: list[Message] | None) -> None:
        threads.append(threading.current_thread())
        told.put(added)

    assert one.policy.give("a", then)
    assert told.get(timeout=TIMEOUT) == [message("user", "saw a")]
    assert one.policy.give("b", then)
    assert told.get(timeout=TIMEOUT) is None
    assert threads == [one.thread, one.thread]
    one.join()
    assert not one.policy.give("c", then) and told.empty()


def test_nothing_is_given_to_a_scaffold_that_does_not_ask(running) -> None:
    asks = threading.Event()

    def scaffold(policy: InvertedPolicy) -> None:
        asks.wait(TIMEOUT)
        policy.query([message("user", "x")])

    one = running(scaffold)
    told: Told[list[Message] | None] = Told()
    assert not one.policy.give("too early", told.put)
    asks.set()
    assert one.policy.first(TIMEOUT) == [message("user", "x")]
    assert one.policy.give("a", told.put)
    assert told.get(timeout=TIMEOUT) is None
    assert one.policy.turns == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_taken_back_or_stopped_is_told_once_at_most(running, stopped: bool) -> None:
    works = threading.Event()
    one = running(busy(works, "y"))
    one.policy.first(TIMEOUT)
    told: Told[list[Message] | None] = Told()
    then = told.put
    assert one.policy.give("a", then)
    if stopped:
        one.policy.stop(EndedBy.TIME)
        assert told.get(timeout=TIMEOUT) is None  # at once: the scaffold still works
    assert one.policy.take_back(then) is not stopped
    works.set()
    if not stopped:
        assert one.policy.first(TIMEOUT) == [message("user", "y")]
        one.policy.stop()
    one.join()
    assert told.empty()
    assert isinstance(one.error, PolicyStopped)
