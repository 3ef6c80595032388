"""The line in which rollouts wait to be graded."""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections.abc import Callable

import pytest

from skyrl_minisandbox.errors import NodeError
from skyrl_minisandbox.waiting_line import WaitingLine
from tests.support import seconds


class Visitor(threading.Thread):
    """Comes, stays until it is told to go, and says how it went."""

    def __init__(self, line: WaitingLine, name: str, came: list[str], limit: int) -> None:
        super().__init__(daemon=True)
        self.line, self.label, self.came, self.limit = line, name, came, limit
        self.go = threading.Event()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.line.turn(self.label, self.limit):
                self.came.append(self.label)
                self.go.wait(seconds(30))
                if self.label == "raises":
                    raise ValueError(self.label)
        except (NodeError, ValueError) as error:
            self.error = error


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds(30)
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def visitors(line: WaitingLine, came: list[str], *names: str, limit: int = 1) -> list[Visitor]:
    """They come one after the other."""
    made: list[Visitor] = []
    for name in names:
        made.append(Visitor(line, name, came, limit))
        until(lambda: len(came) + len(line) == len(made))
    return made


def test_so_many_are_inside_and_the_others_follow_in_the_order_in_which_they_came() -> None:
    came: list[str] = []
    line = WaitingLine()
    all_of_them = visitors(line, came, *"abcdef", limit=2)
    assert (came, len(line)) == (["a", "b"], 4)
    for leaving, inside in ((1, "abc"), (0, "abcd"), (2, "abcde"), (3, "abcdef")):
        all_of_them[leaving].go.set()
        until(functools.partial(operator.eq, came, list(inside)))
    for visitor in all_of_them:
        visitor.go.set()
        visitor.join(seconds(30))
        assert not visitor.is_alive()


@pytest.mark.parametrize("ending", ["leaves", "raises"])
def test_whoever_leaves_makes_room_however_it_leaves(ending: str) -> None:
    came: list[str] = []
    line = WaitingLine()
    first, second = visitors(line, came, ending, "second")
    first.go.set()
    until(lambda: came == [ending, "second"])
    assert isinstance(first.error, ValueError) == (ending == "raises")
    second.go.set()


def test_the_limit_is_what_the_last_one_said_and_one_of_nothing_still_lets_one_in() -> None:
    came: list[str] = []
    line = WaitingLine()
    first, *others = visitors(line, came, *"abc", limit=0)
    assert came == ["a"]
    last = Visitor(line, "d", came, 3)
    until(lambda: sorted(came) == ["a", "b", "c"] and len(line) == 1)
    first.go.set()
    until(lambda: came[3:] == ["d"])
    for visitor in (*others, last):
        visitor.go.set()


def test_one_that_is_sent_away_raises_and_takes_nobodys_turn() -> None:
    came: list[str] = []
    line = WaitingLine()
    first, second, third = visitors(line, came, *"abc")
    line.send_away("b", NodeError("given up"))
    line.send_away("a", NodeError("too late for one that is inside"))
    second.join(seconds(30))
    assert str(second.error) == "given up"
    assert len(line) == 1
    first.go.set()
    until(lambda: came == ["a", "c"])
    assert first.error is None
    third.go.set()


def test_when_it_is_closed_all_who_wait_or_come_later_raise() -> None:
    came: list[str] = []
    line = WaitingLine()
    first, second, third = visitors(line, came, *"abc")
    line.close(NodeError("over"))
    for visitor in (second, third):
        visitor.join(seconds(30))
        assert str(visitor.error) == "over"
    with pytest.raises(NodeError, match="over"), line.turn("d", 1):
        pass
    first.go.set()
    first.join(seconds(30))
    assert first.error is None and came == ["a"]
