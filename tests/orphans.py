"""Run a command; fail when it leaves a process behind. `scripts/test` runs pytest under it.

    python -m tests.orphans SECONDS COMMAND …

This process becomes a child subreaper (prctl(2)): whatever loses its parent below it comes here and is reaped
here. What still lives SECONDS after the command has ended is printed, ended, and makes the exit status 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from tests.machine import become_subreaper, descendants


def main(grace: float, argv: list[str]) -> int:
    become_subreaper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it too, and says when it is done
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execvp(argv[0], argv)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    status = 0
    pid = 0
    while pid != child:
        pid, waited = os.waitpid(-1, 0)
        if pid == child:
            status = os.waitstatus_to_exitcode(waited)
    deadline = time.monotonic() + grace
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)
    for process in left:
        print(f"left behind: process {process}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    if left and status == 0:
        return 1
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
