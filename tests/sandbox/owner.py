"""An owner to be killed: makes and uses sandboxes on threads until it is told to end.

    python -m tests.sandbox.owner LAYER SEED [THREADS]      works until killed; prints a line once it has begun
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec
from tests.sandbox.conftest import MIB, base_binds


def work(spec: SandboxSpec, seed: int) -> None:
    """Without end: a sandbox, some of what one does with it, and one of the ways to let go of it."""
    chance = random.Random(seed)
    dropped: list[Sandbox] = []
    while True:
        sandbox = Sandbox(spec)
        shell = sandbox.shell()
        for _ in range(chance.randrange(4)):
            act = chance.randrange(5)
            if act == 0:
                sandbox.run("(setsid sleep 1000 &); sleep 1000 & echo on")
            elif act == 1:
                shell.run("cd /tmp; export X=1; sleep 1000 &")
            elif act == 2:
                sandbox.write_file("/testbed/file", chance.randbytes(100_000))
            elif act == 3:
                shell.run("while :; do :; done", timeout=0.05)
            else:
                sandbox.freeze()
        if chance.random() < 0.2:
            dropped = [*dropped[-2:], sandbox]  # some live on, some are collected
        else:
            sandbox.close()


def main() -> None:
    layer, seed, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 4
    limits = Limits(memory=512 * MIB, processes=200, disk=64 * MIB, output=MIB)
    spec = SandboxSpec((layer,), base_binds(), workdir="/testbed", limits=limits, scratch=layer.parent / "scratch")
    print("begins", flush=True)
    for number in range(threads):
        threading.Thread(target=work, args=(spec, seed * 100 + number), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
