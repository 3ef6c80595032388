"""A worker process: rollouts by id, and a launcher of its own. A request is handled in a thread of its own, but for a
step, by far the most frequent: who reads it hands it over, and its answer is sent by the scaffold's thread.

A scaffold's thread that is stuck cannot be killed, and a crash in C takes its process along; so
rollouts live in processes that a node can lose. The channel is one inherited socket: its EOF ends the
worker, and with it its launcher and every sandbox, however the owner died.

Wire, one pickle after the other (both ends are ours; nothing from inside a sandbox is on it): first a
`WorkerSetup`; then requests `(call, method, arguments)` and replies `(call, value, error)`.
Call 0 is a notice of the worker's own: `stuck`, after which the node gives it nothing new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from skyrl_minisandbox.alarms import ALARMS
from skyrl_minisandbox.errors import MiniSandboxError, NodeError, one_line
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.rollout import Finish, Rollout
from skyrl_minisandbox.turn import RolloutRequest, Turn

if TYPE_CHECKING:
    from skyrl_minisandbox.images import Cache, Store
    from skyrl_minisandbox.images.pools import Pools

logger = logging.getLogger(__name__)

NOTICE = 0
STUCK = "stuck"
_SPARE = 8
"""Threads that are kept for requests to come."""

FAREWELL = 5.0
"""Seconds that an orphaned worker takes to end its sandboxes itself; what is left the kernel ends."""


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """sys_path: where the owner finds modules, so that a scaffold of the user's own is found here too."""

    node: str
    store: str
    cache: str
    sys_path: tuple[str, ...] = ()


class Worker:
    """Rollouts of one process. Every method may be called from any thread."""

    def __init__(self, setup: WorkerSetup, notify: Callable[[str], None]) -> None:
        self._setup = setup
        self._notify = notify
        self._lock = threading.Lock()  # guards _rollouts and the two below
        self._rollouts: dict[str, Rollout] = {}
        self._images: tuple[Store, Cache, Pools] | None = None
        self._closing = False

    def open(self, request: RolloutRequest) -> Turn:
        """Start a rollout and run it to its scaffold's first question."""
        rollout = self._new(request)
        return self._guarded(rollout, rollout.open)

    def grade(self, request: RolloutRequest, patch: str) -> Turn:
        """Only grade a patch."""
        rollout = self._new(request)
        return self._guarded(rollout, lambda: rollout.grade(patch))

    def _new(self, request: RolloutRequest) -> Rollout:
        store, cache, pools = self._places()
        rollout = Rollout(request, store=store, cache=cache, node=self._setup.node, pools=pools)
        with self._lock:
            if self._closing:
                raise NodeError("the worker process is ending")
            if request.rollout_id in self._rollouts:
                raise NodeError(f"rollout {request.rollout_id} is open already")
            self._rollouts[request.rollout_id] = rollout
        return rollout

    def step(self, rollout_id: str, text: str) -> Turn:
        """Answer a rollout's question."""
        rollout = self._rollout(rollout_id)
        return self._guarded(rollout, lambda: rollout.step(text))

    def begin(self, rollout_id: str, text: str, reply: Callable[[Turn | Finish], None]) -> bool:
        """`step` without waiting. False, and nothing happens, where it cannot be begun so: `step` does it.

        reply: as for `Rollout.begin`; the function to call may raise.
        """
        with self._lock:
            rollout = self._rollouts.get(rollout_id)
        if rollout is None:
            return False

        def answered(rest: Turn | Finish) -> None:
            reply(rest if isinstance(rest, Turn) else lambda: self._guarded(rollout, rest))

        return rollout.begin(text, answered)

    def judge(self, rollout_id: str) -> Turn:
        """Grade a rollout that has ended."""
        rollout = self._rollout(rollout_id)
        return self._guarded(rollout, rollout.judge)

    def close(self, rollout_id: str, grade: bool, ended_by: EndedBy) -> Turn | None:
        """End a rollout; None where it was given up, or is not known (any more)."""
        with self._lock:
            rollout = self._rollouts.get(rollout_id)
        if rollout is None:
            return None
        turn = rollout.close(grade=grade, ended_by=ended_by)
        if turn is None or turn.done:
            self._forget(rollout)
        elif rollout.stuck:
            self._notify(STUCK)
        return turn

    def end(self) -> None:
        """Give up every rollout, end what waits in pools, and the launcher."""
        with self._lock:
            self._closing = True
            rollouts = list(self._rollouts.values())
            pools = self._images[2] if self._images is not None else None
        endings = [rollout.abort for rollout in rollouts] + ([pools.close] if pools is not None else [])
        threads = [threading.Thread(target=ending, daemon=True) for ending in endings]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(FAREWELL)
        launcher = sys.modules.get("skyrl_minisandbox.sandbox.client")
        if launcher is not None:
            launcher.shutdown_launcher()

    def _places(self) -> tuple[Store, Cache, Pools]:
        from skyrl_minisandbox.images import Cache, Store
        from skyrl_minisandbox.images.pools import Pools

        with self._lock:
            if self._images is None:
                store, cache = Store(Path(self._setup.store)), Cache(Path(self._setup.cache))
                self._images = (store, cache, Pools(store, cache))
            return self._images

    def _rollout(self, rollout_id: str) -> Rollout:
        with self._lock:
            if rollout_id not in self._rollouts:
                raise NodeError(f"rollout {rollout_id} is not open on node {self._setup.node}")
            return self._rollouts[rollout_id]

    def _guarded(self, rollout: Rollout, call: Callable[[], Turn]) -> Turn:
        """A rollout that is over, or that met a fault of our own code, holds nothing any more."""
        try:
            turn = call()
        except BaseException:
            rollout.abort()
            self._forget(rollout)
            raise
        if turn.done:
            self._forget(rollout)
        elif rollout.stuck:
            self._notify(STUCK)  # its grade is still to come, and may be long in coming
        return turn

    def _forget(self, rollout: Rollout) -> None:
        with self._lock:
            self._rollouts.pop(rollout.request.rollout_id, None)
        if rollout.stuck:
            self._notify(STUCK)


def serve(owner: socket.socket) -> None:
    """Answer requests until the owner hangs up."""
    requests = owner.makefile("rb")
    sending = threading.Lock()  # a reply may be more than one write

    def send(call: int, value: Any, error: BaseException | None) -> None:
        data = pickle.dumps((call, value, error), pickle.HIGHEST_PROTOCOL)
        with sending, contextlib.suppress(OSError):  # the owner is gone; the reading thread sees it too and ends us
            owner.sendall(data)

    setup: WorkerSetup = pickle.load(requests)
    sys.path.extend(path for path in setup.sys_path if path not in sys.path)
    worker = Worker(setup, lambda word: send(NOTICE, word, None))
    threading.Thread(target=_warm_up, name="warm-up", daemon=True).start()
    methods: dict[str, Callable[..., Any]] = {
        "open": worker.open,
        "grade": worker.grade,
        "step": worker.step,
        "close": worker.close,
        "judge": worker.judge,
        "end": worker.end,
        "sign": lambda: None,
    }

    def answer(call: int, method: str, function: Callable[[], Any]) -> None:
        try:
            send(call, function(), None)
        except MiniSandboxError as error:
            send(call, None, error)
        except BaseException as error:
            logger.exception("%s failed", method)
            send(call, None, NodeError(f"{method} failed on node {setup.node}: {one_line(error)}"))

    def begin(call: int, method: str, arguments: tuple[Any, ...]) -> bool:
        if method != "step":
            return False

        def reply(rest: Turn | Finish) -> None:
            if isinstance(rest, Turn):
                answer(call, method, lambda: rest)
            else:  # in another thread than this one, whenever one can be started
                ALARMS.set(call, 0.0, lambda: answer(call, method, rest))

        rollout_id, text = arguments
        return worker.begin(rollout_id, text, reply)

    def handle(call: int, method: str, arguments: tuple[Any, ...]) -> None:
        answer(call, method, lambda: methods[method](*arguments))

    ALARMS.start()
    Readers(requests, begin, handle).run()
    farewell = threading.Thread(target=worker.end, daemon=True)
    farewell.start()
    farewell.join(2 * FAREWELL)


class Readers:
    """Threads that take turns: the one that has read a request handles it while the next one reads.

    So no request waits for a thread to start or to wake up. There are as many as requests are under way, and one.

    begin: handles a request without waiting, or says that it cannot. handle: for all others.
    """

    def __init__(
        self,
        requests: IO[bytes],
        begin: Callable[[int, str, tuple[Any, ...]], bool],
        handle: Callable[[int, str, tuple[Any, ...]], None],
    ) -> None:
        self._requests, self._begin, self._handle = requests, begin, handle
        self._reading = threading.Lock()  # held by the one that reads
        self._lock = threading.Lock()  # guards the one below
        self._free = 0  # threads that read, or wait for that
        self._over = threading.Event()

    def run(self) -> None:
        """Until the owner hangs up."""
        self._start()
        self._over.wait()

    def _start(self) -> None:
        with self._lock:
            self._free += 1
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError:  # as soon as one can be started
            ALARMS.set(self, 0.0, self._work)

    def _work(self) -> None:
        while not self._over.is_set():
            with self._reading:
                try:
                    while True:
                        call, method, arguments = pickle.load(self._requests)
                        if not self._begin(call, method, arguments):
                            break
                except Exception as error:
                    if not isinstance(error, EOFError | OSError):
                        logger.exception("a request cannot be read or begun, so that nothing after it can be")
                    self._over.set()
                    return
            with self._lock:
                self._free -= 1
                alone = self._free == 0
            if alone:
                self._start()
            which = arguments[0] if arguments and isinstance(arguments[0], str) else call
            threading.current_thread().name = f"{method}-{which}"
            self._handle(call, method, arguments)
            with self._lock:
                if self._free >= _SPARE:
                    return
                self._free += 1


def _warm_up() -> None:
    """Import what every rollout needs and start the launcher, so that the first one does not wait for it."""
    from skyrl_minisandbox import images, rewards  # noqa: F401
    from skyrl_minisandbox.sandbox.client import shared

    try:
        shared()
    except MiniSandboxError as error:
        logger.warning("%s", error.render())  # the first rollout meets it again and tells


def main() -> None:
    """`python -m skyrl_minisandbox.worker FD`, started by a node."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    # Ray blocks SIGINT in its processes. A mask is inherited across exec, down to the tests inside a sandbox,
    # where one that waits for its own KeyboardInterrupt would fail through Ray and pass without it.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s")
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # threads that are stuck must not keep us


if __name__ == "__main__":
    main()
