"""`scripts/bench/sandbox --profile create` (or reset, fork, shell, run): where the time goes.

Every function of the sandbox package is wrapped in the launcher, and so in the inits that are forked from it; each call
writes its start and duration to a file. Nothing is known here of what those functions are called, so the list stays
right when they move. A wrapped call costs some two microseconds more.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benches.contender import Ground
from benches.sandbox.ours import Ours, OurSeat

_TRACER = '''
import os, sys, time, types, functools
trace = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
os.dup2(trace, 900); os.close(trace); trace = 900
import skyrl_minisandbox.sandbox.launcher
at = [os.getpid(), 0, os.getpid()]  # the process, how deep in it, and a name that no other process has
clock = time.monotonic_ns
SKIP = {{"seccomp": ("_",), "wire": ("",), "syscalls": ("",), "spec": ("",)}}
def wrap(function, name):
    @functools.wraps(function)
    def traced(*args, **kwargs):
        pid = os.getpid()
        if at[0] != pid: at[:] = pid, 0, clock()
        if at[1] >= {deepest}: return function(*args, **kwargs)
        note = name
        for arg in args[:3]:
            if type(arg) is str and len(arg) < 60: note += " " + arg.replace("\\n", " ")
        at[1] += 1
        start = clock()
        try: return function(*args, **kwargs)
        finally:
            end = clock()
            now = os.getpid()
            if now == pid: at[1] -= 1
            else: at[:] = now, 0, clock()
            os.write(trace, f"{{at[2]}}\t{{at[1]}}\t{{start}}\t{{end}}\t{{note}}\\n".encode(errors="replace"))
    return traced
def close_range(first, last):
    if first <= trace <= last:
        if first < trace: real(first, trace - 1)
        if trace < last: real(trace + 1, last)
    else: real(first, last)
linux = sys.modules["skyrl_minisandbox.sandbox.linux"]
real = linux.close_range
found = {{real: close_range}}
modules = [(n.rpartition(".")[2], m) for n, m in sys.modules.items() if n.startswith("skyrl_minisandbox.sandbox.")]
def wanted(module, name):
    return not name.startswith("__") and not any(name.startswith(p) for p in SKIP.get(module, ("\\0",)))
for short, module in modules:
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__: continue
        if isinstance(value, types.FunctionType) and value not in found and wanted(short, name):
            if value.__code__.co_flags & 0x20: continue  # a generator: its time is its consumer's
            found[value] = wrap(value, f"{{short}}.{{name}}")
        elif isinstance(value, type):
            for key, method in list(vars(value).items()):
                plain = method.__func__ if isinstance(method, staticmethod) else method
                if not isinstance(plain, types.FunctionType) or not wanted(short, key): continue
                if plain.__code__.co_flags & 0x20: continue
                if key in ("serve", "_flush", "_throttle", "_wait", "_expire"): continue
                traced = wrap(plain, f"{{short}}.{{name}}.{{key}}")
                setattr(value, key, staticmethod(traced) if isinstance(method, staticmethod) else traced)
for short, module in modules:
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and value in found: setattr(module, name, found[value])
'''


@dataclasses.dataclass(frozen=True)
class Call:
    """Times in ms from the start of the create."""

    process: int
    depth: int
    start: float
    end: float
    name: str


Work = Callable[[Ours], Iterator[None]]


def _create(ours: Ours) -> Iterator[None]:
    yield
    seat = OurSeat(ours.sandbox())
    seat.echo()
    yield
    seat.close()


def _in_one(method: Callable[[OurSeat], object]) -> Work:
    def work(ours: Ours) -> Iterator[None]:
        with ours.sandbox() as sandbox:
            seat = OurSeat(sandbox)
            seat.echo()
            method(seat)  # the second one is what is looked at
            yield
            method(seat)
            yield

    return work


def _fork(ours: Ours) -> Iterator[None]:
    with ours.sandbox() as sandbox:
        sandbox.shell().run("dd if=/dev/zero of=/big bs=1M count=100")
        yield
        (child,) = sandbox.fork(1)
        child.shells[0].run("echo ours")
        yield
        child.close()


WORKS: dict[str, Work] = {
    "create": _create, "create-off": _create, "reset": _in_one(OurSeat.reset), "fork": _fork,
    "shell": _in_one(OurSeat.echo), "run": _in_one(OurSeat.true),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """took: ms as the caller sees it."""

    took: float
    launcher: int
    calls: list[Call]

    def own(self, index: int) -> float:
        """Ms of a call without the traced ones below it."""
        call = self.calls[index]
        below = sum(
            other.end - other.start for other in self.calls[index + 1 :]
            if other.process == call.process and other.depth == call.depth + 1 and other.start < call.end
        )
        return call.end - call.start - below

    def who(self, call: Call) -> str:
        return "launcher" if call.process == self.launcher else f"init {call.process % 1000:03}"


def _sample(ours: Ours, trace: Path, work: Work) -> Sample:
    """`work` stops at two places: what lies between them is looked at."""
    steps = work(ours)
    next(steps)
    time.sleep(0.05)
    trace.write_bytes(b"")
    begun = time.monotonic_ns()
    next(steps)
    done = time.monotonic_ns()
    lines = trace.read_text().splitlines()
    next(steps, None)
    calls = []
    for line in lines:
        process, depth, start, end, name = line.split("\t", 4)
        if int(end) > begun and int(start) < done:
            calls.append(Call(int(process), int(depth), (int(start) - begun) / 1e6, (int(end) - begun) / 1e6, name))
    calls.sort(key=lambda call: (call.start, call.depth))
    return Sample((done - begun) / 1e6, ours.launcher.pid, calls)


def profile(ground: Ground, what: str, *, count: int = 20, deepest: int = 6, least: float = 0.03) -> None:
    """Print the sample with the median total as a time line, then what each function took, as medians of all."""
    trace = ground.work / "trace"
    trace.touch()
    ours = Ours(cgroup=what != "create-off", boot=_TRACER.format(path=str(trace), deepest=deepest))
    ours.start(ground)
    try:
        samples = [_sample(ours, trace, WORKS[what]) for _ in range(count)]
    finally:
        ours.stop()
    samples.sort(key=lambda sample: sample.took)
    middle = samples[len(samples) // 2]
    out = sys.stdout
    out.write(f"{what}: {middle.took:.2f} ms (traced; median of {count})\n\n")
    out.write("  starts    took     own  who       call (ms)\n")
    for index, call in enumerate(middle.calls):
        if call.end - call.start >= least:
            out.write(f"{call.start:8.2f}{call.end - call.start:8.2f}{middle.own(index):8.2f}  {middle.who(call):9} "
                      f"{'  ' * call.depth}{call.name}\n")
    out.write("\nown time by function, ms, median\n")
    for total, who, name, times in _by_function(samples)[:40]:
        out.write(f"{total:8.3f}  {who:9} {times:4.0f}x  {name}\n")


def _by_function(samples: list[Sample]) -> list[tuple[float, str, str, float]]:
    totals: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for sample in samples:
        own: dict[tuple[str, str], list[float]] = {}
        for index, call in enumerate(sample.calls):
            if call.start >= 0:  # one that began before has been waiting
                own.setdefault((sample.who(call).split(" ")[0], call.name.split(" ")[0]), []).append(sample.own(index))
        for key, values in own.items():
            totals.setdefault(key, []).append((sum(values), len(values)))
    rows = []
    for (who, name), found in totals.items():
        rows.append((statistics.median(v for v, _ in found), who, name, statistics.median(n for _, n in found)))
    return sorted(rows, reverse=True)
