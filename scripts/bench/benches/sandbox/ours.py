"""Our own sandbox as a contender: what a user of the Python API gets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from benches.contender import Absent, Contender, Ground, Seat, Stopwatch
from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec, client

GIB = 1 << 30
LIMITS = Limits(memory=4 * GIB, processes=1024, disk=2 * GIB)
# Said to the launcher's interpreter before it starts.
NO_CGROUP = (
    "import skyrl_minisandbox.sandbox.limits as limits\n"
    "class Refused(limits.Cgroups):\n"
    "    def __init__(self, *_, **__): raise limits.NoCgroup('switched off by the benchmark')\n"
    "limits.Cgroups = Refused\n"
)


@contextlib.contextmanager
def boot(extra: str) -> Iterator[None]:
    """Launchers made meanwhile run `extra` first. Raises `Absent` when the client has no such place any more."""
    original: str = getattr(client, "BOOT", "")
    path, _, rest = original.partition(";from ")
    if not rest:
        raise Absent("the launcher's boot line is not as this benchmark knows it")
    client.BOOT = f"{path};exec({extra!r});from {rest}"
    try:
        yield
    finally:
        client.BOOT = original


def expect(output: bytes, token: bytes) -> None:
    if output.strip() != token:
        raise RuntimeError(f"the sandbox answered {output[:200]!r} for {token!r}")


class OurSeat(Seat):
    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.shell = sandbox.shell()

    def echo(self) -> float:
        with Stopwatch() as watch:
            done = self.shell.run("echo ours")
        expect(done.stdout, b"ours")
        return watch.seconds

    def true(self) -> float:
        with Stopwatch() as watch:
            done = self.sandbox.run(["true"])
        expect(done.stdout + str(done.exit_code).encode(), b"0")
        return watch.seconds

    def reset(self) -> float:
        method = getattr(self.sandbox, "reset", None)
        if method is None:
            raise Absent("this version has no reset")
        with Stopwatch() as watch:
            method()
            self.shell = self.sandbox.shell()
            done = self.shell.run("echo ours")
        expect(done.stdout, b"ours")
        return watch.seconds

    def close(self) -> float:
        with Stopwatch() as watch:
            self.sandbox.close()
        return watch.seconds

    def roots(self) -> list[int]:
        return [self.sandbox.pid]


class Ours(Contender):
    """cgroup: False for a launcher that is told that there is none. boot: what its launcher executes first."""

    def __init__(self, *, cgroup: bool = True, boot: str = "") -> None:
        self.cgroup = cgroup
        self._boot = boot if cgroup else NO_CGROUP + boot
        self.name = "ours" if cgroup else "ours, cgroup off"

    def start(self, ground: Ground) -> None:
        with boot(self._boot) if self._boot else contextlib.nullcontext():
            self.launcher = client.LauncherClient()
        if bool(self.launcher.facts.get("cgroup")) == self.cgroup:
            self.stop()
            raise Absent(f"cgroups: {self.launcher.facts.get('cgroup') or 'they could not be switched off'}")
        scratch = ground.work / "scratch"
        self.spec = SandboxSpec(layers=(ground.root,), limits=LIMITS, scratch=scratch, start_shell=True)

    def stop(self) -> None:
        self.launcher.close()

    def version(self) -> str:
        import skyrl_minisandbox

        return skyrl_minisandbox.__version__

    def sandbox(self, **changes: Any) -> Sandbox:
        import dataclasses

        return Sandbox(dataclasses.replace(self.spec, **changes), launcher=self.launcher)

    def open(self) -> tuple[Seat, float]:
        with Stopwatch() as watch:
            seat = OurSeat(self.sandbox())
            done = seat.shell.run("echo ours")
        expect(done.stdout, b"ours")
        return seat, watch.seconds
