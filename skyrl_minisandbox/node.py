"""What owns one machine's cache and sandboxes: placement on its worker processes, leases, losses.

`Node` works in any process; `NodeActor` is the same behind Ray. A worker process is in one of three states:

    serving ── says "stuck" ──> draining ── its last rollout ended ──> gone
       └───────── ended by itself (crash, out of memory) ──────────────> gone

A worker that drains or is gone is replaced at once. Its rollouts, where it is gone, are lost with a
`WorkerLost`: the caller decides whether that is tried again elsewhere. What is tried again because a process of ours
died, and a grading that is repeated, has a worker of its own that drains from the start: what happens to it then is
nobody else's doing, and does nothing to others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import site
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from skyrl_minisandbox.alarms import ALARMS
from skyrl_minisandbox.channel import Callee
from skyrl_minisandbox.claims import Claim, sweep
from skyrl_minisandbox.errors import MiniSandboxError, NodeError, OutOfMemory, WorkerLost
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.rewards.fault import needs_its_own_worker
from skyrl_minisandbox.sandbox.cgroup_places import memory_counter
from skyrl_minisandbox.sandbox.limits import read_oom_kills
from skyrl_minisandbox.turn import RolloutRequest, Turn
from skyrl_minisandbox.worker import NOTICE, STUCK, WorkerSetup

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROLLOUTS_PER_CPU = 2
"""Slots of a node by default: a rollout mostly waits for the model, and is at work or graded else."""

ENDING = 15.0
"""Seconds that a worker has to end when asked; then it is killed."""

GIVING_UP = 30.0
"""Seconds that giving a rollout up may take, above what a scaffold has to end; then its worker is asked for a sign."""

SIGN = 30.0
"""Seconds that a worker has to give a sign of life, on a busy machine; without one it hangs as a whole."""


@dataclasses.dataclass(frozen=True)
class NodeSetup:
    """What a node must know.

    name: for records and messages. out: run directory, empty for none.
    slots: rollouts to run at once; 0: `ROLLOUTS_PER_CPU` for each CPU that we may use.
    """

    name: str
    store: str
    cache: str
    workers: int = 2
    slots: int = 0
    out: str = ""
    sys_path: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NodeStatus:
    """slots: what it should run at once. open: what it runs. lost_workers: processes that died, ever."""

    name: str
    slots: int
    open: int
    lost_workers: int
    pids: tuple[int, ...]


class Node:
    """One machine's rollouts. Thread-safe; every verb returns a Future and never blocks on a rollout."""

    def __init__(self, setup: NodeSetup) -> None:
        """Sweep what crashed runs left, start the workers."""
        self.setup = setup
        for path in sweep(Path(setup.cache)):
            logger.warning("node %s: removed what a run that crashed had left: %s", setup.name, path)
        self.slots = setup.slots or ROLLOUTS_PER_CPU * len(os.sched_getaffinity(0))
        self._claim, self.logs = self._log_directory()
        self._lock = threading.Lock()  # guards all below
        self._workers: list[WorkerProcess] = []
        self._leases: dict[str, WorkerProcess] = {}
        self._losses: dict[str, NodeError] = {}  # rollouts that were lost while nobody waited for them
        self._started = 0
        self._lost = 0
        self._ended = False
        with self._lock:
            self._replenish()

    # -- verbs ------------------------------------------------------------------------------------

    def open(self, request: RolloutRequest) -> Future[Turn]:
        """Start a rollout on the worker with the fewest; beyond `slots` too (the caller decides)."""
        worker = self._lease(request, alone=needs_its_own_worker(request.before))
        return self._watched(request.rollout_id, worker.call("open", request))

    def grade(self, request: RolloutRequest, patch: str) -> Future[Turn]:
        """Only grade a patch, by a worker process of its own."""
        worker = self._lease(request, alone=True)
        return self._watched(request.rollout_id, worker.call("grade", request, patch))

    def step(self, rollout_id: str, text: str) -> Future[Turn]:
        """Answer a rollout's question."""
        return self._watched(rollout_id, self._leased(rollout_id).call("step", rollout_id, text))

    def judge(self, rollout_id: str) -> Future[Turn]:
        """Grade a rollout that has ended, where it has run."""
        return self._watched(rollout_id, self._leased(rollout_id).call("judge", rollout_id))

    def close(self, rollout_id: str, grade: bool, ended_by: EndedBy = EndedBy.LENGTH) -> Future[Turn | None]:
        """End a rollout, to be graded or given up. One that is not open any more gives None."""
        with self._lock:
            worker = self._leases.get(rollout_id)
            self._losses.pop(rollout_id, None)
        if worker is None:
            done: Future[Turn | None] = Future()
            done.set_result(None)
            return done
        future: Future[Turn | None] = worker.call("close", rollout_id, grade, ended_by)

        def ended(done: Future[Turn | None]) -> None:
            if done.exception() is None:
                turn = done.result()
                if turn is not None and turn.ungraded:
                    return
            self._end_lease(rollout_id)

        future.add_done_callback(ended)
        if not grade:
            ALARMS.set(future, GIVING_UP, worker.kill_unless_alive)
            future.add_done_callback(ALARMS.cancel)
        return future

    def status(self) -> NodeStatus:
        """A snapshot."""
        with self._lock:
            pids = tuple(worker.pid for worker in self._workers)
            return NodeStatus(self.setup.name, self.slots, len(self._leases), self._lost, pids)

    def shutdown(self) -> None:
        """End every rollout and worker. Idempotent."""
        with self._lock:
            self._ended = True
            workers, self._workers = self._workers, []
        # All at once, and without threads: at the exit of a Python 3.12 process there are no new ones.
        asked = [worker.call("end") for worker in workers]
        for worker, answer in zip(workers, asked, strict=True):
            worker.end(answer)
        if self._claim is not None:
            self._claim.release()

    # -- leases -----------------------------------------------------------------------------------

    def _lease(self, request: RolloutRequest, *, alone: bool) -> WorkerProcess:
        with self._lock:
            if self._ended:
                raise NodeError(f"node {self.setup.name} has ended")
            self._replenish()
            if alone:
                worker = self._start()
                worker.draining = True
            else:
                worker = min((w for w in self._workers if not w.draining), key=lambda w: w.rollouts)
            worker.rollouts += 1
            self._leases[request.rollout_id] = worker
            return worker

    def _leased(self, rollout_id: str) -> WorkerProcess:
        with self._lock:
            if rollout_id in self._losses:
                raise self._losses.pop(rollout_id)
            if rollout_id not in self._leases:
                raise NodeError(f"rollout {rollout_id} is not open on node {self.setup.name}")
            return self._leases[rollout_id]

    def _watched(self, rollout_id: str, future: Future[Turn]) -> Future[Turn]:
        def ended(done: Future[Turn]) -> None:
            if done.exception() is not None or done.result().done:
                self._end_lease(rollout_id)

        future.add_done_callback(ended)
        return future

    def _end_lease(self, rollout_id: str) -> None:
        with self._lock:
            worker = self._leases.pop(rollout_id, None)
            self._losses.pop(rollout_id, None)
            if worker is None:
                return
            worker.rollouts -= 1
            finished = worker.draining and worker.rollouts == 0
            if finished and worker in self._workers:
                self._workers.remove(worker)
        if finished:
            threading.Thread(target=worker.end, daemon=True).start()

    # -- workers ----------------------------------------------------------------------------------

    def _replenish(self) -> None:
        """Bring the workers that serve to the wanted number. Called with the lock held."""
        if self._ended:
            return
        for _ in range(self.setup.workers - sum(not worker.draining for worker in self._workers)):
            self._start()

    def _start(self) -> WorkerProcess:
        """One more. Called with the lock held."""
        self._started += 1
        setup = WorkerSetup(self.setup.name, self.setup.store, self.setup.cache, self.setup.sys_path)
        log = self.logs / f"worker-{self._started}.log"
        worker = WorkerProcess(setup, log, self._gone, self._stuck)
        self._workers.append(worker)
        return worker

    def _gone(self, worker: WorkerProcess, why: NodeError) -> None:
        with self._lock:
            if worker not in self._workers:
                return  # we ended it ourselves
            self._workers.remove(worker)
            self._lost += 1
            lost = [rollout for rollout, owner in self._leases.items() if owner is worker]
            for rollout in lost:
                del self._leases[rollout]
                self._losses[rollout] = why
            self._replenish()
        logger.error("node %s: worker process %d is gone, %d rollouts lost", self.setup.name, worker.pid, len(lost))

    def _stuck(self, worker: WorkerProcess) -> None:
        with self._lock:
            worker.draining = True
            idle = worker.rollouts == 0 and worker in self._workers
            if idle:
                self._workers.remove(worker)
            self._replenish()
        logger.error("node %s: worker process %d is stuck and will be replaced", self.setup.name, worker.pid)
        if idle:
            threading.Thread(target=worker.end, daemon=True).start()

    def _log_directory(self) -> tuple[Claim | None, Path]:
        """Below the run directory, else (none given, or not writable on this machine) below the cache."""
        if self.setup.out:
            logs = Path(self.setup.out) / "logs" / self.setup.name
            with contextlib.suppress(OSError):
                logs.mkdir(parents=True, exist_ok=True)
                return None, logs
        cache = Path(self.setup.cache)
        claim = Claim(cache, cache / "runs", f"{self.setup.name}-")
        return claim, claim.path


class WorkerProcess:
    """The owner's end of one worker process."""

    def __init__(
        self,
        setup: WorkerSetup,
        log: Path,
        on_gone: Callable[[WorkerProcess, NodeError], None],
        on_stuck: Callable[[WorkerProcess], None],
    ) -> None:
        self.rollouts = 0  # guarded by the node's lock, as `draining` is
        self.draining = False
        self._setup, self._log = setup, log
        self._on_gone, self._on_stuck = on_gone, on_stuck
        self._sending = threading.Lock()  # a request may be more than one write
        self._lock = threading.Lock()  # guards the three below
        self._calls: dict[int, Future[Any]] = {}
        self._last_call = NOTICE
        self._over: NodeError | None = None
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "skyrl_minisandbox.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_worker_env(),
                start_new_session=True,  # Ctrl-C in the terminal is the owner's to handle
            )
        self.pid = self._process.pid
        self._memory = MemoryKills(self.pid)
        self._socket = ours
        self._replies = ours.makefile("rb")
        self._send(setup)
        threading.Thread(target=self._read, name=f"worker-{self.pid}", daemon=True).start()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Ask for something; the Future gets the answer, or `WorkerLost` or `OutOfMemory` when the process is gone."""
        future: Future[Any] = Future()
        with self._lock:
            if self._over is not None:
                future.set_exception(self._over)
                return future
            if method in ("open", "grade", "judge"):
                self._memory.look()
            self._last_call += 1
            call = self._last_call
            self._calls[call] = future
        self._send((call, method, arguments))
        return future

    def end(self, asked: Future[Any] | None = None) -> None:
        """Wait for what `call("end")` gave (called here by default), then kill it. Its rollouts are gone."""
        with contextlib.suppress(MiniSandboxError, TimeoutError):
            (asked or self.call("end")).result(ENDING)
        with contextlib.suppress(OSError):
            # Shut down, not closed: the reading thread is in a read of this very descriptor.
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)
        self._kill()
        self._process.wait()

    def kill_unless_alive(self) -> None:
        """One that gives no sign of life is killed, and its rollouts are lost now. In any case it gets no new ones."""
        answered = threading.Event()  # or gone, which nothing has to be done about

        def ask() -> None:
            self.call("sign").add_done_callback(lambda _: answered.set())

        threading.Thread(target=ask, daemon=True).start()  # what does not read its socket may block it
        if not answered.wait(SIGN):
            logger.error("worker process %d of node %s hangs and is killed", self.pid, self._setup.node)
            self._kill()
        elif self._over is None:
            self._on_stuck(self)  # it lives, and does not end what it should: its launcher hangs, say

    def _kill(self) -> None:
        """With its launcher, which may hang as well. What they would have removed is swept at the next start."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # it leads a group, whose number is not given again while that lives

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._sending, contextlib.suppress(OSError):  # gone: the reading thread tells everybody
            self._socket.sendall(data)

    def _read(self) -> None:
        try:
            while True:
                call, value, error = pickle.load(self._replies)
                if call == NOTICE:
                    if value == STUCK:
                        self._on_stuck(self)
                    continue
                with self._lock:
                    future = self._calls.pop(call)
                future.set_exception(error) if error is not None else future.set_result(value)
        except (EOFError, OSError):
            pass
        except Exception:  # a reply that cannot be read: this process cannot be talked to any more
            if not self._hung_up():
                logger.exception("worker process %d", self.pid)
                self._kill()
        self._bury()

    def _hung_up(self) -> bool:
        """Whether the other end is closed: what was being read was cut short."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def _bury(self) -> None:
        try:
            code = self._process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self._kill()
            code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        which = f"worker process {self.pid} of node {self._setup.node}"
        with self._lock:
            if code == -signal.SIGKILL and self._memory.grew():
                self._over = OutOfMemory(
                    f"{which} was killed: no memory was left where it ran",
                    hint="fewer rollouts at once (cluster.slots=N), or a smaller sandbox.memory",
                )
            else:
                self._over = WorkerLost(f"{which} is gone ({how}); its log: {self._log}")
            calls, self._calls = self._calls, {}
            self._replies.close()
            self._socket.close()
        self._on_gone(self, self._over)
        for future in calls.values():
            future.set_exception(self._over)


class MemoryKills:
    """How often the kernel killed something for memory in a process's own cgroup, sandboxes below it not counted.

    That one of ours dies with it is a guess when several died at once, and a good one: all are killed for the same
    reason, which is the machine's.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._path, self._count = "", -1

    def look(self) -> None:
        """Remember where the process is and what was counted there so far."""
        self._path = memory_counter(self._pid)
        self._count = read_oom_kills(self._path)

    def grew(self) -> bool:
        """Whether something was killed since; False where nothing counts."""
        return read_oom_kills(self._path) > self._count >= 0


class NodeActor:
    """A Node behind Ray: thin, one per Ray node, with `channel.EXCHANGES` threads. Drivers call its verbs through a
    channel."""

    def __init__(self, setup: NodeSetup) -> None:
        self._node = Node(setup)
        node = self._node
        self._callee = Callee(node.open, node.grade, node.step, node.judge, node.close)
        handler = logging.FileHandler(self._node.logs / "node.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("skyrl_minisandbox").addHandler(handler)

    def exchange(self, data: bytes) -> bytes:
        return self._callee.exchange(data)

    def status(self) -> NodeStatus:
        return self._node.status()

    def shutdown(self) -> None:
        self._node.shutdown()


def _worker_env() -> dict[str, str]:
    """Our environment, and this very package findable where it is not installed (a checkout on sys.path)."""
    ours = str(Path(__file__).resolve().parent.parent)
    path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    if ours not in (
        *site.getsitepackages(),
        site.getusersitepackages(),
    ):  # these come after the standard library
        path.insert(0, ours)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
