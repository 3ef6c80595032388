"""Booting a guest: qemu with the machine's acceleration where that works, emulation where it does not."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.guest.image import GuestError, cache_directory, checkout_disk, root_disk, suite_of

UP = "--- guest is up"  # as tests/guest/inside.py prints it
_MEMORY = 3000  # MiB
_RESULTS = 64 << 20
# How long a guest may need until it is up. Under nested virtualisation kvm may start and then not get anywhere.
_BOOT = {"kvm": 20.0, "tcg": 300.0}
# How much slower than the machine itself; deadlines of tests are scaled by it.
FACTOR = {"kvm": 4.0, "tcg": 20.0}


@dataclasses.dataclass(frozen=True)
class Run:
    """A command in the guest. place: see tests/guest/inside.py. limit: seconds."""

    name: str
    who: str
    place: str
    argv: tuple[str, ...]
    limit: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a guest left: results.json of inside.py ({} when it did not come to it), and the directory of each run."""

    results: dict[str, object]
    directory: Path


class Console:
    """Where a guest's console goes: our stdout, each line with the guest's name before it where it has one."""

    def __init__(self, name: str = "") -> None:
        self._before = f"{name}: " if name else ""
        self._rest = ""

    def show(self, text: str) -> None:
        if self._before:
            *lines, self._rest = (self._rest + text).split("\n")
            text = "".join(f"{self._before}{line}\n" for line in lines)
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, text: str) -> None:
        self.show(f"guest: {text}\n")


def boot(
    kernel: str, runs: Sequence[Run], limit: float, out: Path, accelerators: Sequence[str] = (),
    console: Console | None = None, enough: threading.Event | None = None,
) -> Outcome:
    """Run these in one guest, at most `limit` seconds or until it is enough. Raises GuestError."""
    console, enough = console or Console(), enough or threading.Event()
    root = root_disk(suite_of(kernel))
    tried = list(accelerators or (["kvm", "tcg"] if _may_try_kvm() else ["tcg"]))
    with tempfile.TemporaryDirectory(prefix="minisandbox-tests-guest-") as directory:
        scratch = Path(directory)
        results = scratch / "results.img"
        for accelerator in tried:
            factor = FACTOR[accelerator]
            plan = {"runs": [_planned(run, factor) for run in runs]}
            checkout_disk(scratch / "checkout.img", plan)
            with open(results, "wb") as file:
                file.truncate(_RESULTS)
            console.say(f"qemu with accel={accelerator}, 2 CPUs, {_MEMORY} MiB; deadlines x {factor:g}, "
                        f"at most {limit / 60:.0f} minutes")
            reason = _qemu(accelerator, root, scratch, limit, console.show, enough)
            if not reason.startswith("not up"):
                break
            console.say(f"accel={accelerator}: {reason}")
            if accelerator == "kvm":
                _no_kvm().write_text(_this_boot())
        else:
            raise GuestError(f"the guest does not boot ({', '.join(tried)})")
        if reason:
            console.say(reason)
        return _read(results, out)


def _this_boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _no_kvm() -> Path:
    """Holds the boot of the machine in which kvm was tried in vain, so that it is tried once."""
    return cache_directory() / "kvm-in-vain"


def _may_try_kvm() -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    return not (_no_kvm().exists() and _no_kvm().read_text() == _this_boot())


def _planned(run: Run, factor: float) -> dict[str, object]:
    environment = {"MINISANDBOX_DEADLINE_FACTOR": f"{factor:g}", **dict(run.environment)}
    return {**dataclasses.asdict(run), "environment": environment}


def _qemu(
    accelerator: str, root: Path, scratch: Path, limit: float, show: Callable[[str], None], enough: threading.Event
) -> str:
    """Boot, show the console, wait for the end; what went wrong, or ""."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise GuestError("not installed: qemu-system-x86_64\nhint: apt-get install qemu-system-x86")
    append = "root=/dev/vda rw console=ttyS0 quiet loglevel=3 init=/guest-init panic=1 mitigations=off"
    disks = (f"{root}/root.img,snapshot=on", f"{scratch}/checkout.img,read-only=on", f"{scratch}/results.img")
    argv = [
        # Whatever ends this process ends the guest with it.
        "setpriv", "--pdeathsig", "KILL", program, "-machine", f"accel={accelerator}", "-cpu",
        "host" if accelerator == "kvm" else "max", "-m", str(_MEMORY), "-smp", "2", "-display", "none", "-monitor",
        "none", "-serial", "stdio", "-no-reboot", "-nic", "none", "-kernel", f"{root}/vmlinuz", "-initrd",
        f"{root}/initrd.img", "-append", append, "-device", "virtio-rng-pci",
    ]
    for disk in disks:
        argv += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    # A session of its own: Ctrl-C reaches us only, and we end it.
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    try:
        return _watch(process, _BOOT[accelerator], limit, show, enough)
    finally:
        process.kill()
        process.wait()


def _watch(
    process: subprocess.Popen[bytes], boot_limit: float, limit: float, show: Callable[[str], None],
    enough: threading.Event,
) -> str:
    assert process.stdout is not None
    started = time.monotonic()
    up, last = False, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = started + (limit if up else min(boot_limit, limit)) - time.monotonic()
            if left <= 0:
                return f"ended after {limit:.0f} s: over its time" if up else f"not up after {boot_limit:.0f} s"
            if enough.is_set():
                return "interrupted"
            if not selector.select(min(left, 1.0)):
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return "" if up else f"not up: {last.decode(errors='replace').strip()[-300:] or 'qemu ended'}"
            last = (last + chunk)[-4000:]
            if up:
                show(_text(chunk))
            elif UP.encode() in last:
                up = True
                show(_text(last[last.index(UP.encode()):]))


def _text(chunk: bytes) -> str:
    return chunk.decode(errors="replace").replace("\r", "")


def _read(disk: Path, out: Path) -> Outcome:
    """Unpack what the guest wrote. It is a disk of zeros when no run ended."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {}
    try:
        with tarfile.open(disk, mode="r:") as archive:
            archive.extractall(out, filter="data")
        results = json.loads((out / "results.json").read_text())
    except (tarfile.TarError, OSError, ValueError):
        pass
    return Outcome(results, out)
