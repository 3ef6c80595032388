"""Call every system call number with junk, each in a child of its own: `python3 -m inside.every_syscall FIRST LAST`.

Prints a JSON object: number -> errno, 0 where the call returned, or null where it did not come back (exit, pause, a
signal). What a call is good for is no matter here: what is asked is who refuses it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
JUNK = 0xFFFFFFFFFFFFF000 - (1 << 64)  # as a pointer outside of every process, as a descriptor and a flag nonsense


def attempt(number: int) -> int | None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        arguments = [ctypes.c_long(JUNK)] * 6
        result = libc.syscall(ctypes.c_long(number), *arguments)
        code = ctypes.get_errno() if result == -1 else 0
        try:
            os.write(writing, str(code).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 1.0)
    told = os.read(reading, 16) if ready else b""
    os.close(reading)
    for target in (-pid, pid):  # what it may have forked, and itself
        try:
            os.kill(target, signal.SIGKILL)
        except OSError:
            pass
    os.waitpid(pid, 0)
    return int(told) if told else None


if __name__ == "__main__":
    first, last = map(int, sys.argv[1:])
    print(json.dumps({number: attempt(number) for number in range(first, last)}))
