"""scripts/bench/sandbox: run the rows, print the table, write the JSON."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benches.command import add_choice, add_options, deliver, expect_known, run, say
from benches.contender import Absent, Contender, Ground
from benches.report import Report
from benches.sandbox import root
from benches.sandbox.floor import Floor
from benches.sandbox.measures import Measures
from benches.sandbox.ours import Ours
from benches.sandbox.peers import DEBIAN_PACKAGES, PEERS, libraries
from benches.sandbox.peers.programs import Reference
from benches.sandbox.profile import WORKS, profile
from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.sandbox import linux

_CHECKOUT = Path(__file__).resolve().parents[4]
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Seconds after which no other row is begun.
_TIME, _QUICK_TIME = 480.0, 50.0
_QUICK_PEERS = ("floor", "nitrobox", "bubblewrap", "sandlock", "crun", "reference without archive")


def contenders() -> dict[str, Contender]:
    """Everybody but ourselves, by name."""
    found: list[Contender] = [Floor(), *(peer() for peer in PEERS)]
    found.append(Reference(archive=False))
    return {contender.name: contender for contender in found}


def install_peers(peers: Path) -> None:
    """What Debian and the Python package index have of them; needs root."""
    if os.geteuid() != 0:
        sys.exit("--install-peers needs root")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False, stdout=sys.stderr, env=environment)
        # A service that a package starts would be a daemon of the machine's: the policy forbids it meanwhile.
        policy = Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            for package in DEBIAN_PACKAGES:
                done = subprocess.run(
                    ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, check=False,
                )
                if done.returncode:
                    say(f"{package}: {(done.stderr.strip().splitlines() or ['apt-get failed'])[-1]}")
        finally:
            if ours:
                policy.unlink()
    else:
        say("no apt-get: install " + ", ".join(DEBIAN_PACKAGES) + " yourself")
    for package in ("nitrobox", "sandlock"):
        reason = "" if libraries.installed(peers, package) else libraries.install(peers, package)
        if reason:
            say(f"{package}: {reason}")


@contextlib.contextmanager
def ground(arguments: argparse.Namespace, peers: Path) -> Iterator[Ground]:
    """A root file system, an archive, and a directory; all but what is kept for the next run is removed at the end."""
    work = Path(tempfile.mkdtemp(prefix="minisandbox-bench-", dir=arguments.work))
    work.chmod(0o755)
    try:
        place, name = work / "root", ""
        if not arguments.quick and os.geteuid() == 0 and shutil.which("mmdebstrap"):
            try:
                say("unpacking a minimal Debian (once)")
                place = peers / "debian"
                name = root.debian_root(place)
            except (ImportError, MiniSandboxError, subprocess.SubprocessError, OSError) as error:
                say(f"no Debian: {error}; a small root instead")
                place = work / "root"
        if not name:
            name = root.small_root(place)
        archive = None
        if not arguments.quick and "reference" in arguments.peers:
            say("packing an environment for the reference")
            archive = root.environment_archive(work / "environment.tar.gz")
        yield Ground(work, place, name, archive, peers)
    finally:
        _end_cgroups()
        _unmount_below(work)
        shutil.rmtree(work, ignore_errors=True)


def _end_cgroups() -> None:
    """Cgroups of peers that failed, with what still runs in them; each peer gives its own this process's number."""
    name = f"minisandbox-bench-{os.getpid()}-*"
    for path in (*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")):
        for directory, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):
                for pid in Path(directory, "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            for _ in range(50):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
                if not os.path.exists(directory):
                    break
                time.sleep(0.02)


def _unmount_below(directory: Path) -> None:
    """What a peer left mounted there when it failed."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split(" ")[4]
        if target.startswith(f"{directory}/"):
            with contextlib.suppress(OSError):
                linux.umount(target)


def private_mounts() -> None:
    """As root: mounts of the peers are in a namespace that goes with this process, whatever ends it. And what they
    leave behind becomes our child, so that its memory is counted and it is seen at the end."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            linux.unshare(linux.CLONE_NEWNS)
            linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def measure(arguments: argparse.Namespace, peers: Path) -> Report:
    report = Report("sandbox")
    with ground(arguments, peers) as place, contextlib.ExitStack() as stack:
        report.facts.update(root=place.root_name, quick=arguments.quick, euid=os.geteuid())
        ours = Ours()
        ours.start(place)
        stack.callback(ours.stop)
        report.versions["ours"] = ours.version()
        known = contenders()
        running: list[Contender] = []
        for name in arguments.peers:
            contender = known[name]
            say(f"starting {name}")
            try:
                contender.start(place)
            except Absent as why:
                report.absent[name] = str(why)
                continue
            except Exception as error:
                report.absent[name] = f"does not start: {error}"
                continue
            stack.callback(contender.stop)
            running.append(contender)
            if contender.version():
                report.versions[name] = contender.version()
        for name in known.keys() - set(arguments.peers):
            report.absent[name] = "not asked for" if arguments.peers_chosen else "left out of a quick run"
        measures = Measures(place, report, ours, running, quick=arguments.quick)
        begun = time.monotonic()
        for name, row in measures.rows().items():
            if name not in arguments.rows:
                continue
            started = time.monotonic()
            if started - begun > (_QUICK_TIME if arguments.quick else _TIME):
                report.not_run[name] = "no time was left: this machine is busy; ask for it with --rows"
                continue
            try:
                row()
            except KeyboardInterrupt:
                report.not_run[name] = "interrupted, as all that would have followed"
                break
            except Absent as why:
                report.not_run[name] = str(why)
            except Exception as error:
                report.not_run[name] = f"{type(error).__name__}: {error}"
            say(f"{name}: {time.monotonic() - started:.1f} s")
    return report


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/sandbox", description=__doc__)
    rows = list(Measures.rows(Measures.__new__(Measures)))
    names = list(contenders())
    add_options(parser, "at most a minute: few samples, a small root, fewer peers")
    add_choice(parser, rows)
    parser.add_argument("--peers", help=f"some of {','.join(names)}; none for an empty text")
    parser.add_argument("--install-peers", action="store_true", help="first install what can be had of the peers; root")
    parser.add_argument("--profile", choices=list(WORKS), help="only show where the time of one goes")
    parsed = parser.parse_args(argv)
    parsed.rows = parsed.rows.split(",") if parsed.rows else rows
    parsed.peers_chosen = parsed.peers is not None
    if parsed.peers is not None:
        parsed.peers = [name.strip() for name in parsed.peers.split(",") if name.strip()]
    else:
        parsed.peers = list(_QUICK_PEERS) if parsed.quick else names
    expect_known(parser, parsed.rows, rows)
    expect_known(parser, parsed.peers, names)
    return parsed


def main() -> None:
    arguments = arguments_of(sys.argv[1:])
    peers = _CHECKOUT / ".cache/bench"
    peers.mkdir(parents=True, exist_ok=True)
    if arguments.install_peers:
        install_peers(peers)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    private_mounts()
    if arguments.profile:
        arguments.quick = True
        with ground(arguments, peers) as place:
            profile(place, arguments.profile)
        return
    deliver(measure(arguments, peers), arguments)


if __name__ == "__main__":
    run(main)
