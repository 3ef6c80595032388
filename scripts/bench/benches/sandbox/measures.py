"""What is measured, row by row, in the order of the table."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from benches import memory
from benches.contender import Absent, Contender, Ground, Held, Seat, Stopwatch, descendants
from benches.report import Bar, Report, Row
from benches.sampling import alternate
from benches.sandbox.floor import Floor
from benches.sandbox.ours import Ours, OurSeat, expect

MIB = 1 << 20
# Net namespaces are taken apart and RCU waits after each sandbox: a sample starts when that is over. Seconds.
PAUSE = 0.05
WIDTH = 32


class Measures:
    """One run. quick: fewer samples and smaller crowds, the same rows."""

    def __init__(
        self, ground: Ground, report: Report, ours: Ours, peers: list[Contender], *, quick: bool
    ) -> None:
        self._ground, self._report, self._ours, self._quick = ground, report, ours, quick
        self._floor = next((peer for peer in peers if isinstance(peer, Floor)), None)
        self._peers = peers
        self._settle = 0.4 if quick else 1.5  # seconds; net namespaces and grace periods again, of many at once
        self._create: dict[str, float] = {}  # p50 of a create by contender, seconds

    def rows(self) -> dict[str, Callable[[], None]]:
        return {
            "create": self.create, "create-off": self.create_without_cgroup, "pool": self.pool, "rate": self.rate,
            "shell": self.shell, "run": self.run, "reset": self.reset, "fork": self.fork,
            "live": self.live, "memory": self.idle, "rate-1": self.rate_of_one,
        }

    # What every row needs

    def _all(self) -> list[Contender]:
        return [self._ours, *self._peers]

    def _add(
        self, measure: str, unit: str, values: dict[str, float], bars: tuple[Bar, ...] = (),
        failed: dict[str, str] | None = None,
    ) -> None:
        """A row from values by contender, ours among them."""
        ours = values.pop(self._ours.name, None)
        self._report.rows.append(Row(measure, unit, ours, values, bars))
        for name, why in (failed or {}).items():
            self._report.not_run[f"{measure}, {name}"] = why

    def _milliseconds(self, values: dict[str, list[float]]) -> dict[str, float]:
        return {name: statistics.median(found) * 1e3 for name, found in values.items()}

    @contextlib.contextmanager
    def _seats(self) -> Iterator[dict[str, Seat]]:
        seats: dict[str, Seat] = {}
        try:
            for contender in self._all():
                with contextlib.suppress(RuntimeError, Absent):
                    seats[contender.name] = contender.open()[0]
            yield seats
        finally:
            for seat in seats.values():
                seat.close()

    def _create_time(self, contender: Contender) -> float:
        """Seconds; measured now if the row of it was not asked for."""
        if contender.name not in self._create:
            times = []
            for _ in range(3):
                time.sleep(PAUSE)
                seat, seconds = contender.open()
                seat.close()
                times.append(seconds)
            self._create[contender.name] = statistics.median(times)
        return self._create[contender.name]

    # The rows

    def create(self) -> None:
        ended: dict[str, list[float]] = {}

        def sample(contender: Contender) -> Callable[[], float]:
            def one() -> float:
                seat, seconds = contender.open()
                gone = seat.close()
                ended.setdefault(contender.name, []).append(gone)
                return seconds

            return one

        values, failed = alternate(
            {contender.name: sample(contender) for contender in self._all()},
            rounds=15 if self._quick else 60, budget=1.5 if self._quick else 10.0, pause=PAUSE,
        )
        self._create = {name: statistics.median(found) for name, found in values.items()}
        self._add(
            "create to the first echo in the shell", "ms", self._milliseconds(values),
            (Bar(2.0, "floor"), Bar(0.25, "nitrobox")), failed,
        )
        self._add("close: nothing of it is left", "ms", self._milliseconds(ended))

    def create_without_cgroup(self) -> None:
        ours, floor = Ours(cgroup=False), Floor(cgroup=False)
        started: list[Contender] = []
        try:
            for starting in (ours, floor):
                starting.start(self._ground)
                started.append(starting)

            def sample(contender: Contender) -> Callable[[], float]:
                def one() -> float:
                    seat, seconds = contender.open()
                    seat.close()
                    return seconds

                return one

            values, failed = alternate(
                {"ours": sample(ours), "floor": sample(floor)},
                rounds=15 if self._quick else 60, budget=1.5 if self._quick else 10.0, pause=PAUSE,
            )
            self._add(
                "create to the first echo, cgroup off", "ms", self._milliseconds(values), (Bar(1.5, "floor"),), failed
            )
        finally:
            for contender in started:
                contender.stop()

    def pool(self) -> None:
        import skyrl_minisandbox.sandbox as room

        maker = getattr(room, "Pool", None)
        if maker is None:
            raise Absent("this version has no Pool")
        pool = maker(self._ours.spec, 2, self._ours.launcher)

        def one() -> float:
            pool.wait_full(20.0)
            time.sleep(PAUSE)
            with Stopwatch() as watch:
                sandbox = pool.take()
                done = sandbox.shell().run("echo ours")
            expect(done.stdout, b"ours")
            sandbox.close()
            return watch.seconds

        try:
            rounds, budget = (15, 3.0) if self._quick else (60, 20.0)
            values, failed = alternate({"ours": one}, rounds=rounds, budget=budget)
        finally:
            pool.close()
        self._add("from a warm pool to the first echo", "ms", self._milliseconds(values), (Bar(1.0),), failed)

    def rate(self) -> None:
        """In three turns of all; those that are slow have one, and a crowd that they get through."""
        self._rate(WIDTH, (
            Bar(0.6, "floor", at_least=True), Bar(4.0, "nitrobox", at_least=True), Bar(80.0, "docker", at_least=True),
        ))

    def rate_of_one(self) -> None:
        """One after another without a pause: what is made ahead is used up, and its price shows."""
        self._rate(1, ())

    def _rate(self, wanted: int, bars: tuple[Bar, ...]) -> None:
        budget = 1.0 if self._quick or wanted == 1 else 5.0
        values: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        for turn in range(1 if self._quick else 3):
            for contender in self._all():
                try:
                    one = self._create_time(contender)
                    if contender.name in failed or (turn and one > 0.2):
                        continue
                    width = wanted if one < 1.0 else min(wanted, 4)
                    count = max(width, min(600, int(budget / one)))
                    if width < wanted and turn == 0:
                        self._report.notes.append(f"sandboxes per second: {contender.name} was given {width} at a time")
                    time.sleep(self._settle / 2)
                    values.setdefault(contender.name, []).append(contender.rate(count, width))
                except Exception as error:
                    failed[contender.name] = f"{type(error).__name__}: {error}"
        self._add(
            f"sandboxes per second, {wanted} at a time", "/s",
            {name: statistics.median(found) for name, found in values.items()}, bars, failed,
        )

    def shell(self) -> None:
        with self._seats() as seats:
            ours = seats[self._ours.name]
            assert isinstance(ours, OurSeat)
            ours.shell.run("export BENCH=kept; cd /tmp; f() { echo $BENCH $PWD; }")
            ours.shell.run("exit 3")
            expect(ours.shell.run("f").stdout, b"kept /tmp")
            values, failed = alternate(
                {name: seat.echo for name, seat in seats.items()},
                rounds=100 if self._quick else 400, budget=1.0 if self._quick else 5.0, pause=0.001,
            )
        self._add(
            "`echo` in the shell, environment kept over an exit", "ms", self._milliseconds(values), (Bar(1.0),), failed
        )

    def run(self) -> None:
        with self._seats() as seats:
            values, failed = alternate(
                {name: seat.true for name, seat in seats.items()},
                rounds=50 if self._quick else 200, budget=1.0 if self._quick else 3.0, pause=0.002,
            )
        self._add('run(["true"]): a new process in it', "ms", self._milliseconds(values), (Bar(3.0),), failed)

    def reset(self) -> None:
        """Peers without one end the sandbox and make a new one."""

        def again(contender: Contender, place: dict[str, Seat]) -> Callable[[], float]:
            def one() -> float:
                try:
                    return place[contender.name].reset()
                except Absent:
                    ended = place[contender.name].close()
                    place[contender.name], seconds = contender.open()
                    return ended + seconds

            return one

        with self._seats() as seats:
            samples = {c.name: again(c, seats) for c in self._all() if c.name in seats}
            if not hasattr(getattr(seats.get(self._ours.name), "sandbox", None), "reset"):
                raise Absent("this version has no reset")
            values, failed = alternate(
                samples, rounds=10 if self._quick else 25, budget=1.0 if self._quick else 4.0, pause=PAUSE
            )
        shown = self._milliseconds(values)
        shown["our create"] = self._create_time(self._ours) * 1e3
        self._add("reset, to the first echo", "ms", shown, (Bar(1.0, "our create"),), failed)

    def fork(self) -> None:
        growth: list[float] = []

        def one() -> float:
            with self._ours.sandbox() as sandbox:
                if not hasattr(sandbox, "fork"):
                    raise Absent("this version has no fork")
                shell = sandbox.shell()
                shell.run("head -c 104857600 /dev/zero | tr '\\0' x > /big || dd if=/dev/zero of=/big bs=1M count=100")
                expect(shell.run("stat -c %s /big").stdout, b"104857600")
                time.sleep(PAUSE)
                before = memory.shmem()
                with Stopwatch() as watch:
                    (child,) = sandbox.fork(1)
                    done = child.shells[0].run("echo ours")
                with child:
                    growth.append((memory.shmem() - before) / MIB)
                    expect(done.stdout, b"ours")
                    expect(child.run(["stat", "-c", "%s", "/big"]).stdout, b"104857600")
            return watch.seconds

        values, failed = alternate({self._ours.name: one}, rounds=3 if self._quick else 12, budget=20.0)
        if not values:
            raise Absent(failed[self._ours.name].removeprefix("Absent: "))
        shown = self._milliseconds(values)
        shown["our create"] = self._create_time(self._ours) * 1e3
        self._add("fork, 100 MB of changes, to the child's first echo", "ms", shown, (Bar(2.0, "our create"),), failed)
        copied = {self._ours.name: statistics.median(growth)}
        self._add("fork, 100 MB of changes: memory that is copied", "MB", copied, (Bar(1.0),))

    def idle(self) -> None:
        """Kernel memory is the whole machine's, before and after: the median of some turns, and no number at all when
        what else runs here drowns it."""
        found: dict[str, list[memory.Held]] = {}
        failed: dict[str, str] = {}
        wanted, budget, turns = (10, 1.0, 1) if self._quick else (60, 3.0, 3)
        for turn in range(turns):
            for contender in self._all():
                try:
                    one = self._create_time(contender)
                    if contender.name in failed or (turn and contender not in (self._ours, self._floor)):
                        continue
                    count = max(3 if one < 1 else 1, min(wanted, int(budget / one)))
                    found.setdefault(contender.name, []).append(self._held(contender, count))
                except Exception as error:
                    failed[contender.name] = f"{type(error).__name__}: {error}"
        private = {name: statistics.median(held.private for held in helds) / 1e6 for name, helds in found.items()}
        kernel = {name: statistics.median(held.kernel for held in helds) / 1e6 for name, helds in found.items()}
        disk = {name: statistics.median(one.shmem + one.disk for one in helds) / 1e3 for name, helds in found.items()}
        disk = {name: max(value, 0.0) for name, value in disk.items()}
        for name, value in list(kernel.items()):
            if value <= 0:
                failed[name] = "other work on this machine drowned what the kernel took for it"
                del kernel[name]
        both = {name: private[name] + value for name, value in kernel.items()}
        self._add("memory of an idle sandbox: private and kernel", "MB", both, (Bar(2.0),), failed)
        self._add("  private pages of its processes", "MB", private)
        self._add("  kernel (slab, stacks, page tables, per-cpu)", "MB", kernel)
        self._add("disk of an idle sandbox (tmpfs included)", "kB", disk, (Bar(64.0),))

    def _held(self, contender: Contender, count: int) -> memory.Held:
        """What one of `count` idle ones takes, bytes."""
        contender.hold(min(count, 2)).release()  # what is made once is there
        time.sleep(self._settle)
        before = memory.measure(contender.state())
        held = contender.hold(count)
        try:
            time.sleep(self._settle / 2)
            took = memory.measure(contender.state()) - before
            if contender is self._ours:
                self._note_processes(held)
        finally:
            held.release()
        return memory.Held(took.private // count, took.kernel // count, took.shmem // count, took.disk // count)

    def _note_processes(self, held: Held) -> None:
        """Which of its processes have the private pages of ours."""
        roots = [pid for seat in held.seats for pid in seat.roots()]
        init = statistics.median(map(memory.private, roots)) / 1e6
        below = statistics.median(sum(map(memory.private, descendants([pid]))) for pid in roots) / 1e6 - init
        self._report.notes.append(f"idle, ours: init {init:.2f} MB private, what runs below it {below:.2f} MB")

    def live(self) -> None:
        """On two cores: a launcher made here has no others."""
        count = 40 if self._quick else 1000
        cores = os.sched_getaffinity(0)
        answered: dict[str, float] = {}
        made: dict[str, float] = {}
        failed: dict[str, str] = {}
        os.sched_setaffinity(0, set(sorted(cores)[:2]))
        try:
            crowds: list[Contender] = [Ours(), Floor()] if self._floor is not None else [Ours()]
            for contender in crowds:
                try:
                    contender.start(self._ground)
                    try:
                        answered[contender.name], made[contender.name] = self._crowd(contender, count)
                    finally:
                        contender.stop()
                except Exception as error:
                    failed[contender.name] = f"{type(error).__name__}: {error}"
        finally:
            os.sched_setaffinity(0, cores)
        self._add(f"{count} live sandboxes on 2 cores: that answer", "", answered, (Bar(count, at_least=True),), failed)
        self._add(f"{count} live sandboxes: seconds to make them", "s", made)

    def _crowd(self, contender: Contender, count: int) -> tuple[float, float]:
        before = memory.measure(())
        with Stopwatch() as making:
            held = contender.hold(count) if isinstance(contender, Floor) else _hold_by_threads(contender, count)
        try:
            took = memory.measure(()) - before
            with Stopwatch() as asking:
                answered = held.answer()
        finally:
            with Stopwatch() as ending:
                held.release()
        self._report.notes.append(
            f"{count} live, {contender.name}: made in {making.seconds:.1f} s, "
            f"{took.private / count / 1e6:.2f} MB private and {took.kernel / count / 1e6:.2f} MB kernel each, "
            f"all answered in {asking.seconds:.2f} s, all closed in {ending.seconds:.1f} s"
        )
        return float(answered), making.seconds


def _hold_by_threads(contender: Contender, count: int) -> Held:
    seats: list[Seat] = []
    lock = threading.Lock()

    def one(_: int) -> None:
        seat = contender.open()[0]
        with lock:
            seats.append(seat)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(count)))
    return Held(seats)
