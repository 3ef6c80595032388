"""`scripts/bench/sandbox --profile create`: where the time of one create goes.

Every function of the sandbox package is wrapped in the launcher, and so in the inits that are forked from it; each call
writes its start and duration to a file. Nothing is known here of what those functions are called, so the list stays
right when they move. A wrapped call costs some two microseconds more.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path

from benches.contender import Ground
from benches.sandbox.ours import Ours, OurSeat

_TRACER = '''
import os, sys, time, types, functools
trace = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
os.dup2(trace, 900); os.close(trace); trace = 900
import skyrl_minisandbox.sandbox.launcher
at = [os.getpid(), 0]  # the process, and how deep in it
clock = time.monotonic_ns
SKIP = {{"seccomp": ("_",), "wire": ("",), "syscalls": ("",), "spec": ("",)}}
def wrap(function, name):
    @functools.wraps(function)
    def traced(*args, **kwargs):
        pid = os.getpid()
        if at[0] != pid: at[:] = pid, 0
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
            else: at[:] = now, 0
            os.write(trace, f"{{now}}\t{{at[1]}}\t{{start}}\t{{end}}\t{{note}}\\n".encode(errors="replace"))
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


def _samples(ground: Ground, ours: Ours, trace: Path, count: int) -> list[tuple[float, float, int, list[Call]]]:
    """(ms until the sandbox is ready, ms until the first echo, the launcher's pid, the calls)."""
    found = []
    for _ in range(count):
        time.sleep(0.05)
        trace.write_bytes(b"")
        begun = time.monotonic_ns()
        seat = OurSeat(ours.sandbox())
        ready = time.monotonic_ns()
        seat.echo()
        done = time.monotonic_ns()
        seat.close()
        calls = []
        for line in trace.read_text().splitlines():
            process, depth, start, end, name = line.split("\t", 4)
            if int(start) < done:
                calls.append(
                    Call(int(process), int(depth), (int(start) - begun) / 1e6, (int(end) - begun) / 1e6, name)
                )
        calls.sort(key=lambda call: (call.start, call.depth))
        found.append(((ready - begun) / 1e6, (done - begun) / 1e6, ours.launcher.pid, calls))
    return found


def profile_create(ground: Ground, *, cgroup: bool, count: int = 30, deepest: int = 6, least: float = 0.03) -> None:
    """Print the sample with the median total as a time line, then what each function took, as medians of all."""
    trace = ground.work / "trace"
    trace.touch()
    ours = Ours(cgroup=cgroup, boot=_TRACER.format(path=str(trace), deepest=deepest))
    ours.start(ground)
    try:
        samples = _samples(ground, ours, trace, count)
    finally:
        ours.stop()
    samples.sort(key=lambda sample: sample[1])
    ready, done, launcher, calls = samples[len(samples) // 2]
    out = sys.stdout
    out.write(f"one create, cgroup {'on' if cgroup else 'off'}: ready after {ready:.2f} ms, "
              f"first echo after {done:.2f} ms (traced; median of {count})\n\n")
    out.write("  starts    took     own  who       call (ms)\n")
    for index, call in enumerate(calls):
        took = call.end - call.start
        if took < least:
            continue
        below = sum(
            c.end - c.start for c in calls[index + 1 :]
            if c.process == call.process and c.depth == call.depth + 1 and c.start < call.end
        )
        who = "launcher" if call.process == launcher else "init"
        out.write(f"{call.start:8.2f}{took:8.2f}{took - below:8.2f}  {who:9} {'  ' * call.depth}{call.name}\n")
    out.write("\nown time by function, ms in one create, median\n")
    for total, who, name, times in _by_function(samples)[:40]:
        out.write(f"{total:8.3f}  {who:9} {times:4.0f}x  {name}\n")


def _by_function(samples: list[tuple[float, float, int, list[Call]]]) -> list[tuple[float, str, str, float]]:
    totals: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for _, _, launcher, calls in samples:
        own: dict[tuple[str, str], list[float]] = {}
        for index, call in enumerate(calls):
            below = sum(
                c.end - c.start for c in calls[index + 1 :]
                if c.process == call.process and c.depth == call.depth + 1 and c.start < call.end
            )
            key = ("launcher" if call.process == launcher else "init", call.name.split(" ")[0])
            own.setdefault(key, []).append(call.end - call.start - below)
        for key, values in own.items():
            totals.setdefault(key, []).append((sum(values), len(values)))
    rows = []
    for (who, name), found in totals.items():
        rows.append((statistics.median(v for v, _ in found), who, name, statistics.median(n for _, n in found)))
    return sorted(rows, reverse=True)

