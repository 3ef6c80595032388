"""`scripts/guest` and `scripts/test night --kernel`: a command, or the tests, in a guest with another kernel."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.guest import suites
from tests.guest.image import KERNELS, GuestError, cache_directory, root_disk, suite_of
from tests.guest.machine import Run, boot

_PLACES = ("top", "session", "delegated", "leaf", "none")


def main(argv: list[str]) -> int:
    """0: it went well; 1: a run failed; 3: there is no such guest, or it cannot be made here."""
    parser = argparse.ArgumentParser(
        prog="scripts/guest KERNEL",
        description="Run a command in a qemu guest with another kernel, in a copy of this "
        f"checkout. KERNEL is one of {', '.join(KERNELS)}.",
        epilog="Places in the cgroup hierarchy: top, session (nothing delegated), delegated (systemd's Delegate=yes), "
        "leaf (the same, in a leaf of it), none (no cgroup file system). What the command leaves in $OUT is copied to "
        "--out. Example: scripts/guest 6.1 --user --cgroup leaf python3 -m pytest tests/sandbox/test_limits.py",
    )
    add = parser.add_argument
    add("--user", action="store_true", help="as an ordinary user, not as root")
    add("--cgroup", choices=_PLACES, default="session", help="where the command lies (default: session)")
    add("--minutes", type=float, default=30, help="the guest is ended after these (default: 30)")
    add("--accel", choices=("kvm", "tcg"), help="default: kvm where it works, else tcg")
    add("--out", type=Path, help="a directory for what the command leaves in $OUT")
    add("--at-once", type=int, default=0, help="guests of --tests that run at once (default: one for each processor)")
    add("--tests", action="store_true", help="tests/sandbox and tests/security, every way; COMMAND: pytest's arguments")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND …")
    # The kernel first: argparse would give the options after it to the command.
    kernel, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    given = parser.parse_args(rest)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    accelerators = [given.accel] if given.accel else []
    try:
        suite = suite_of(kernel)
        if given.tests:
            out = given.out or cache_directory() / f"results-{kernel}"
            return suites.run(kernel, command, out, accelerators, given.at_once)
        with tempfile.TemporaryDirectory(prefix="minisandbox-tests-out-") as directory:
            out = given.out or Path(directory)
            if not command:
                print(root_disk(suite))
                return 0
            who = "user" if given.user else "root"
            limit = given.minutes * 60
            one = Run("command", "guest" if given.user else "root", given.cgroup, tuple(command), limit)
            results = boot(kernel, [one], limit + 60, out, accelerators).results
            runs = results.get("runs")
            if not isinstance(runs, list) or not runs:
                print(f"guest: the command ({who}) did not end", file=sys.stderr)
                return 1
            return int(runs[0]["exit"]) if runs[0]["ended"] and runs[0]["exit"] >= 0 else 1
    except GuestError as error:
        print(f"scripts/guest: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("scripts/guest: interrupted; the guest has ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
