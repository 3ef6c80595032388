"""Deadlines that share a thread."""

from __future__ import annotations

import math
import os
import queue
import subprocess
import sys
import threading
import time

import pytest

from skyrl_minisandbox.alarms import Alarms
from tests.support import REPOSITORY, needs, seconds


@pytest.fixture
def alarms() -> Alarms:
    return Alarms()


@pytest.fixture
def rung() -> queue.SimpleQueue[tuple[str, float]]:
    return queue.SimpleQueue()


def test_each_rings_once_in_the_order_of_their_times(alarms: Alarms, rung: queue.SimpleQueue[str]) -> None:
    began = time.monotonic()
    for name, after in (("late", 0.5), ("soon", 0.1), ("later", 0.9), ("now", -1.0)):
        alarms.set(name, after, lambda name=name: rung.put(name))
    assert [rung.get(timeout=seconds(10)) for _ in range(4)] == ["now", "soon", "late", "later"]
    assert time.monotonic() - began >= 0.9
    assert rung.empty() and not alarms._set


def test_one_that_is_cancelled_or_set_anew_does_not_ring_as_before(
    alarms: Alarms, rung: queue.SimpleQueue[str]
) -> None:
    alarms.set("a", 0.2, lambda: rung.put("cancelled"))
    alarms.set("b", 0.2, lambda: rung.put("before"))
    alarms.cancel("a")
    alarms.cancel("never set")
    alarms.set("b", 0.4, lambda: rung.put("anew"))
    assert rung.get(timeout=seconds(10)) == "anew"
    assert rung.empty()


def test_one_for_the_end_of_time_keeps_no_other_waiting(alarms: Alarms, rung: queue.SimpleQueue[str]) -> None:
    alarms.set("endless", math.inf, lambda: rung.put("endless"))
    alarms.set("far", 10 * threading.TIMEOUT_MAX, lambda: rung.put("far"))
    time.sleep(0.1)  # its thread waits by now
    alarms.set("soon", 0.1, lambda: rung.put("soon"))
    assert rung.get(timeout=seconds(10)) == "soon"
    assert set(alarms._set) == {"endless", "far"}


def test_what_one_does_keeps_no_other_waiting(alarms: Alarms, rung: queue.SimpleQueue[str]) -> None:
    released = threading.Event()
    alarms.set("hangs", 0.0, lambda: released.wait(seconds(60)) and None)
    alarms.set("works", 0.1, lambda: rung.put("works"))
    assert rung.get(timeout=seconds(10)) == "works"
    released.set()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_its_own() -> None:
    from skyrl_minisandbox.alarms import ALARMS

    ALARMS.set("parent's", 3600.0, lambda: None)
    pid = os.fork()
    if pid == 0:
        rang = threading.Event()
        inherited = len(ALARMS._set)
        ALARMS.set("child's", 0.05, rang.set)
        os._exit(0 if rang.wait(20) and inherited == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    ALARMS.cancel("parent's")


_NO_THREADS = """
import os, resource, threading, time
from skyrl_minisandbox.alarms import Alarms

def most_processes(most):
    resource.setrlimit(resource.RLIMIT_NPROC, (most, hard))

alarms, rung, hard = Alarms(), [], resource.getrlimit(resource.RLIMIT_NPROC)[1]
{start}
os.setresuid(65533, 65533, 65533)  # root may have any number
most_processes(0)
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(error)
alarms.set("meanwhile", 0.1, lambda: rung.append("meanwhile"))
time.sleep(0.5)
print(rung)
most_processes(hard)
alarms.set("after", 0.1, lambda: rung.append("after"))
deadline = time.monotonic() + 20
while len(rung) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
print(sorted(rung))
"""


@pytest.mark.parametrize("start", ["alarms.start()", ""], ids=["its own there", "its own too"])
@needs("root")
def test_where_no_thread_can_be_started_for_a_while_none_is_lost(start: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NO_THREADS.format(start=start)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=seconds(60),
        check=False,
    )
    assert done.stdout.splitlines() == ["can't start new thread", "[]", "['after', 'meanwhile']"], done.stderr
