"""Where uppers on disk lie, by names that tell whose they are: what a kill -9 or a crash of the machine left is removed
by the next one who makes an upper there.

    <scratch>/upper-<boot>-<pid namespace>-<pid>-<start time>-<random>
"""

from __future__ import annotations

import functools
import os
import re
import secrets
from pathlib import Path

from skyrl_minisandbox.sandbox.processes import start_time
from skyrl_minisandbox.sandbox.state import remove_tree

_NAME = re.compile(r"upper-([0-9a-f]{8})-(\d+)-(\d+)-(\d+)-[0-9a-f]+$")
_swept: set[Path] = set()


def place(scratch: Path) -> Path:
    """A path for a new upper, which is not there yet. Sweeps the directory, once in each process."""
    if scratch not in _swept:
        _swept.add(scratch)
        sweep(scratch)
    boot, namespace = _here()
    pid = os.getpid()
    return scratch / f"upper-{boot}-{namespace}-{pid}-{start_time(pid)}-{secrets.token_hex(8)}"


def sweep(scratch: Path) -> int:
    """Remove the uppers of processes that are no more; returns how many.

    Those of another pid namespace that may live on (another container of this machine) are left alone.
    """
    removed = 0
    boot, namespace = _here()
    try:
        names = os.listdir(scratch)
    except OSError:
        return 0
    for name in names:
        match = _NAME.match(name)
        if match is None:
            continue
        if match[1] == boot and (match[2] != namespace or start_time(int(match[3])) == match[4]):
            continue
        remove_tree(scratch / name)
        removed += 1
    return removed


@functools.cache
def _here() -> tuple[str, str]:
    """This boot of the machine, and this pid namespace, which no fork changes."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read(8)
    return boot, str(os.stat("/proc/self/ns/pid").st_ino)
