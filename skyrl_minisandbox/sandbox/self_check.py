"""Does a sandbox keep its promises on this machine? Tried, and judged: what `minisandbox doctor --sandbox` prints.

Three kinds of trial, in `check/`: attempts from inside (`attempts.py`, `reach.py`, `refused.py`), by root-inside and by
a user-inside, of which the worse verdict is shown; limits and endings, seen from the owner's side (`trials.py`,
`endings.py`); and traps (`traps.py`), which show that an attempt could have succeeded at all.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from skyrl_minisandbox.errors import MachineError, MiniSandboxError, SandboxError
from skyrl_minisandbox.sandbox import client
from skyrl_minisandbox.sandbox.check import attempts, reach, refused, traps, trials
from skyrl_minisandbox.sandbox.check import endings as endings  # it registers its own
from skyrl_minisandbox.sandbox.check.attempts import BAD, NOT_RUN, OK, WEAK
from skyrl_minisandbox.sandbox.features import machine_spec
from skyrl_minisandbox.sandbox.sandbox import Sandbox
from skyrl_minisandbox.sandbox.spec import MIB, Limits, SandboxSpec

_INSIDE = "/var/check"
_USER = "1000"  # of machine_spec's passwd
_DEADLINE = 120.0  # seconds for all attempts of one user; they take a quarter of one on a quiet machine
VERDICTS = (OK, NOT_RUN, WEAK, BAD)
"""From the best to the worst."""
LIMITS = Limits(
    memory=256 * MIB, disk=48 * MIB, processes=100, open_files=512, output=1 << 16, inodes=4096, core=0
)
"""Small, so that reaching each takes no time."""

ACCEPTED = {
    "shell-memory": "commands of one user may look into each other; `sysctl -w kernel.yama.ptrace_scope=1` stops it",
    "limit-memory": "without a memory cgroup, as `minisandbox doctor` says",
    "limit-disk": "without a quota for an upper on disk, as `minisandbox doctor` says",
    "limit-inodes": "without a quota for an upper on disk, as `minisandbox doctor` says",
    "owner-killed": "a machine with more to do than processors takes longer; try again when it is quiet",
    "launcher-killed": "a machine with more to do than processors takes longer; try again when it is quiet",
    "private-proc": "`sandbox.allow_degraded` names it",
}
"""What may be WEAK, and why; any other WEAK counts like BAD."""

FIXES = {
    "limit-memory": "what `minisandbox doctor` says of `cgroup`",
    "limit-disk": "a newer kernel (6.6 or later), or run as root: the upper is a tmpfs then",
    "limit-inodes": "a newer kernel (6.6 or later), or run as root: the upper is a tmpfs then",
    "private-proc": "in a pod set `procMount: Unmasked` or run it privileged",
    "user-inside": "run as root, where that is possible",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One promise, and whether it holds.

    verdict: `OK`, `WEAK`, `BAD` or `not run`, which is never OK. detail: what got through, or why it was not run.
    accepted: why a WEAK is known and let pass, else "". fix: what to do, "" where nothing is to be done.
    """

    name: str
    promise: str
    verdict: str
    detail: str = ""
    accepted: str = ""
    fix: str = ""

    @property
    def broken(self) -> bool:
        return self.verdict == BAD or (self.verdict == WEAK and not self.accepted)


def self_check(
    *,
    allow_degraded: tuple[str, ...] = (),
    change: Callable[[SandboxSpec], SandboxSpec] = lambda spec: spec,
    only: Collection[str] = (),
    directory: str | None = None,
    say: Callable[[str], None] = lambda name: None,
) -> list[Finding]:
    """Try every promise in fresh sandboxes of a launcher of its own; a few seconds. Nothing is left behind.

    change: what to try instead of the usual sandbox over the machine's /usr. only: names of promises; empty: all.
    directory: where a sandbox may have an upper on disk; the usual one for temporary files by default.
    say: told what is tried now.
    Raises `MachineError` where no sandbox can be made, or none in which a Python runs.
    """
    with tempfile.TemporaryDirectory(prefix="minisandbox-check-", dir=directory) as place, traps.planted() as known:
        root = Path(place)
        (root / "layer").mkdir(mode=0o755)
        spec, pythons = machine_spec(root / "layer", root / "scratch")
        spec = change(dataclasses.replace(spec, limits=LIMITS, allow_degraded=allow_degraded))
        say("traps")
        harmless = traps.sprung(known)
        known.update(open_files=LIMITS.open_files, core=LIMITS.core, only=sorted(only))
        launcher = client.LauncherClient()
        try:
            bench = trials.Bench(spec, launcher, _python(spec, launcher, pythons), known)
            return [*_attempted(bench, harmless, say), *_tried(bench, say)]
        finally:
            launcher.close()


def _python(spec: SandboxSpec, launcher: client.LauncherClient, pythons: tuple[str, ...]) -> str:
    """The first interpreter that runs inside. Raises `MachineError`."""
    said = ""
    with Sandbox(spec, launcher) as sandbox:
        for python in pythons:
            result = sandbox.run([python, "-I", "-S", "-c", "import ctypes, json; print('alive')"], timeout=60)
            if result.stdout == b"alive\n":
                return python
            said = result.output.strip() or f"exit code {result.exit_code}"
    raise MachineError(
        f"no Python runs in a sandbox over this machine's /usr: {said}",
        hint="install the system's own, for example with `apt-get install python3`",
    )


# From inside


def _attempted(bench: trials.Bench, harmless: dict[str, str], say: Callable[[str], None]) -> Iterator[Finding]:
    say("attempts from inside")
    with bench.open() as sandbox:
        lost = "proc" in sandbox.lost
        by_root = _attempt_as(bench, sandbox, None)
    by_user = {}
    if not bench.launcher.facts["single_id"]:
        with bench.open() as sandbox:
            by_user = _attempt_as(bench, sandbox, _USER)
    yield Finding(
        "private-proc", "/proc is its own", WEAK if lost else OK, "/proc is empty" if lost else "",
        ACCEPTED["private-proc"] if lost else "", FIXES["private-proc"] if lost else "",
    )
    yield Finding(
        "user-inside", "the same, tried by an ordinary user inside", OK if by_user else NOT_RUN,
        f"{len(by_user)} attempts by uid {_USER}" if by_user else "a single id is mapped here: there is root alone",
        "", "" if by_user else FIXES["user-inside"],
    )
    for name, (verdict, detail) in by_root.items():
        other, other_detail = by_user.get(name, (OK, ""))
        if VERDICTS.index(other) > VERDICTS.index(verdict):
            verdict, detail = other, f"for a user inside: {other_detail}"
        if verdict == OK and name in harmless:
            verdict, detail = NOT_RUN, harmless[name]
        yield _finding(name, attempts.ATTEMPTS[name].promise, verdict, detail)


def _attempt_as(bench: trials.Bench, sandbox: Sandbox, user: str | None) -> dict[str, tuple[str, str]]:
    """Run the attempts in a shell of a sandbox: name -> (verdict, detail), one for each."""
    for module in (attempts, reach, refused):
        path = Path(str(module.__file__))
        sandbox.write_file(f"{_INSIDE}/skyrl_minisandbox/sandbox/check/{path.name}", path.read_bytes())
    sandbox.write_file(f"{_INSIDE}/known.json", json.dumps(bench.known).encode())
    command = shlex.join([bench.python, "-I", "-S", "-B", "-c", traps.BOOT, _INSIDE, f"{_INSIDE}/known.json"])
    try:
        result = sandbox.shell(user=user).run(command, timeout=_DEADLINE)
        said, output = f"exit code {result.exit_code}", result.output
    except SandboxError as error:
        said, output = error.message, ""
    found: dict[str, tuple[str, str]] = {}
    for line in output.splitlines():
        try:
            name, verdict, detail = json.loads(line)
        except ValueError:
            said = line  # of a traceback, the last line
            continue
        found[name] = (verdict, detail)
    wanted = [name for name in attempts.ATTEMPTS if bench.wants(name)]
    missing = [name for name in wanted if name not in found]
    for name in missing:
        found[name] = (NOT_RUN, f"the attempts ended before it, at `{missing[0]}`")
    if missing:
        found[missing[0]] = (BAD, f"the attempt ended the program that tried it: {said}")
    return {name: found[name] for name in wanted}


# From outside


def _tried(bench: trials.Bench, say: Callable[[str], None]) -> Iterator[Finding]:
    for name, one in trials.TRIALS.items():
        if not bench.wants(name):
            continue
        say(name)
        try:
            outcome: Any = one.run(bench)
        except attempts.Lacking as reason:
            outcome = NOT_RUN, str(reason)
        except (MiniSandboxError, OSError) as error:
            outcome = BAD, f"it fails: {error}"
        verdict, detail = outcome if isinstance(outcome, tuple) else (BAD if outcome else OK, outcome or "")
        yield _finding(name, one.promise, verdict, detail)


def _finding(name: str, promise: str, verdict: str, detail: str) -> Finding:
    return Finding(
        name, promise, verdict, detail, ACCEPTED.get(name, "") if verdict == WEAK else "",
        FIXES.get(name, "") if verdict in (WEAK, BAD) else "",
    )
