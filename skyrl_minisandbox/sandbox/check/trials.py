"""Promises that show from the owner's side: limits that are told, files, state. Endings are next door."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from skyrl_minisandbox.sandbox import client
from skyrl_minisandbox.sandbox.check.attempts import WEAK, Lacking, Outcome
from skyrl_minisandbox.sandbox.sandbox import Sandbox
from skyrl_minisandbox.sandbox.spec import SandboxSpec

_FORKS = """
import os, signal, sys, time
made = []
try:
    for _ in range(int(sys.argv[1])):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        made.append(pid)
except OSError:
    pass
for pid in made:
    os.kill(pid, signal.SIGKILL)
print(len(made))
"""
_WRITE = """
import os, sys
os.mkdir("/root/fill")
for n in range(int(sys.argv[1])):
    with open(f"/root/fill/{n}", "wb") as f: f.write(bytes(1 << 20))
"""
_MAKE = "import os, sys\nos.mkdir('/root/m')\nfor n in range(int(sys.argv[1])): open(f'/root/m/{n}', 'w').close()"


class Bench:
    """What a trial works with. known: what was planted. python: an interpreter inside."""

    def __init__(self, spec: SandboxSpec, launcher: client.LauncherClient, python: str, known: dict[str, Any]) -> None:
        self.spec, self.launcher, self.python, self.known = spec, launcher, python, known

    def open(self, spec: SandboxSpec | None = None) -> Sandbox:
        """A fresh sandbox."""
        return Sandbox(spec or self.spec, self.launcher)

    def argv(self, program: str, *arguments: str) -> list[str]:
        """The command that runs a Python program inside."""
        return [self.python, "-I", "-S", "-c", program, *arguments]

    @staticmethod
    def sleeper(argument: str) -> str:
        """A shell command that starts a process which leaves its session and sleeps; `argument` stands in its argv."""
        return (
            f"rm -f /root/up; (setsid bash -c 'echo up > /root/up; sleep 600; :' {argument} > /dev/null 2>&1 &); "
            "while [ ! -s /root/up ]; do sleep 0.02; done"
        )

    def past(self, sandbox: Sandbox, said: str) -> Outcome:
        """What it means that a limit on what is written was passed: an upper on disk has no quota, and is watched."""
        if self.launcher.facts["tmpfs_upper"] and self.spec.upper is None and not self.spec.on_disk:
            return said
        later = sandbox.run(["sleep", "30"], timeout=60)
        return (WEAK, f"{said}; then the sandbox is ended") if later.disk_full else f"{said}, and nothing ends it"

    def wants(self, name: str) -> bool:
        """Whether this promise is to be tried."""
        return not self.known["only"] or name in self.known["only"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """run: what is wrong (BAD), `(verdict, detail)`, or None. Raises `Lacking` where it cannot be judged."""

    promise: str
    run: Callable[[Bench], Outcome]


TRIALS: dict[str, Trial] = {}


def trial(name: str, promise: str) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    def register(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        TRIALS[name] = Trial(promise, run)
        return run

    return register


# Limits


@trial("limit-processes", "there is an end to the processes")
def _processes(bench: Bench) -> Outcome:
    limit = bench.spec.limits.processes
    with bench.open() as sandbox:
        result = sandbox.run(bench.argv(_FORKS, str(limit + 50)), timeout=60)
        if sandbox.run(bench.argv("print('alive')"), timeout=60).stdout != b"alive\n":
            return "nothing can be started any more"
    made = int(result.stdout or b"0")
    return f"{made} of {limit} were made at once" if made > limit else None


@trial("limit-memory", "running out of memory is told, and ends one process")
def _memory(bench: Bench) -> Outcome:
    with bench.open() as sandbox:
        result = sandbox.run(bench.argv(f"a = bytearray({2 * bench.spec.limits.memory})"), timeout=60)
        alive = sandbox.run(bench.argv("print('alive')"), timeout=60).stdout == b"alive\n"
    if result.exit_code == 0:
        return "twice the limit could be had"
    if not alive:
        return "it ended the sandbox"
    if result.oom_killed:
        return None
    if bench.launcher.facts["memory_cgroup"]:
        return f"exit code {result.exit_code}, and `oom_killed` is not told"
    return (WEAK, "limited per process, and not told as `oom_killed`")


@trial("limit-disk", "a full disk is told")
def _disk(bench: Bench) -> Outcome:
    limit = bench.spec.limits.disk >> 20
    with bench.open() as sandbox:
        result = sandbox.run(bench.argv(_WRITE, str(2 * limit)), timeout=120)
        if result.disk_full:
            return None
        if result.exit_code:
            return f"it ends with exit code {result.exit_code}, and `disk_full` is not told"
        return bench.past(sandbox, "more than the limit can be written")


@trial("limit-inodes", "there is an end to the files")
def _inodes(bench: Bench) -> Outcome:
    with bench.open() as sandbox:
        result = sandbox.run(bench.argv(_MAKE, str(bench.spec.limits.inodes + 1000)), timeout=120)
        return bench.past(sandbox, "more than the limit can be made") if result.exit_code == 0 else None


@trial("limit-output", "output is cut, and that is told")
def _output(bench: Bench) -> Outcome:
    limit = bench.spec.limits.output
    with bench.open() as sandbox:
        result = sandbox.run(bench.argv(f"print('x' * {20 * limit})"), timeout=60)
    if result.exit_code or not result.truncated:
        return f"exit code {result.exit_code}, truncated: {result.truncated}"
    return f"{len(result.stdout)} bytes of at most {limit} came" if len(result.stdout) > 2 * limit else None


# Files and state


@trial("files", "files go in and out as they are, and no link leads out")
def _files(bench: Bench) -> Outcome:
    data = bytes(range(256)) * 512
    with bench.open() as sandbox:
        sandbox.write_file("/root/a/b", data, mode=0o600)
        if sandbox.read_file("/root/a/b") != data:
            return "other bytes came back"
        sandbox.run(["ln", "-s", bench.known["secret"], "/root/link"])
        with contextlib.suppress(OSError):
            if bench.known["text"].encode() in sandbox.read_file("/root/link"):
                return "a link inside gives a file of the machine"
    return None


@trial("neighbours", "two sandboxes share nothing")
def _neighbours(bench: Bench) -> Outcome:
    serve = "import socket, time; s = socket.create_server(('127.0.0.1', 7777)); print(1, flush=True); time.sleep(600)"
    connect = "import socket; socket.create_connection(('127.0.0.1', 7777), 5)"
    with bench.open() as one, bench.open() as two:
        one.shell().run(f"echo x > /tmp/mark; echo x > /dev/shm/mark; {bench.python} -I -c \"{serve}\" > /tmp/up &"
                        " while [ ! -s /tmp/up ]; do sleep 0.05; done", timeout=60)
        if one.run(bench.argv(connect), timeout=30).exit_code:
            raise Lacking("a server inside does not answer its own sandbox")
        if two.run(bench.argv(connect), timeout=30).exit_code == 0:
            return "one reaches a server in the other"
        if two.run("ls /tmp/mark || ls /dev/shm/mark", timeout=30).exit_code == 0:
            return "one sees a file of the other"
    return None


def _state(sandbox: Sandbox, *names: str) -> Any:
    """The sandbox, as one that has what this version may not have yet."""
    for name in names:
        if not hasattr(sandbox, name):
            raise Lacking(f"this version has no `{name}`")
    return sandbox


@trial("snapshot", "a snapshot is a layer for others, and `changes` tells what is in it")
def _snapshot(bench: Bench) -> Outcome:
    with bench.open() as made:
        sandbox = _state(made, "snapshot", "changes")
        sandbox.write_file("/root/kept", b"x")
        changed = [change.path for change in sandbox.changes()]
        snapshot = sandbox.snapshot()
        with bench.open(dataclasses.replace(bench.spec, layers=snapshot.layers)) as other:
            if other.read_file("/root/kept") != b"x":
                return "it is not in the other sandbox"
    return None if any(path.strip("/") == "root/kept" for path in changed) else f"`changes` tells {changed[:5]}"


@trial("fork", "a child starts where its parent is, and neither sees the other's writes")
def _fork(bench: Bench) -> Outcome:
    with bench.open() as made:
        sandbox = _state(made, "fork")
        sandbox.shell().run("cd /root; export WORD=kept; echo x > kept", timeout=60)
        (child,) = sandbox.fork(1)
        with child:
            said = child.shells[0].run("echo $WORD $PWD $(cat kept); echo x > /root/new", timeout=60).output
            sandbox.write_file("/root/later", b"x")
            apart = sandbox.run(["ls", "/root/new"]).exit_code and child.run(["ls", "/root/later"]).exit_code
    if said.strip() != "kept /root x":
        return f"the child's shell says {said.strip()!r}"
    return None if apart else "one sees what the other wrote"


@trial("reset", "a reset drops all changes")
def _reset(bench: Bench) -> Outcome:
    with bench.open() as made:
        sandbox = _state(made, "reset")
        sandbox.write_file("/root/gone", b"x")
        sandbox.reset()
        return None if sandbox.run(["ls", "/root/gone"]).exit_code else "a file is still there"
