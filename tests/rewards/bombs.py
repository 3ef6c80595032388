"""What a command inside can do to its sandbox: each row of facts as a line of shell, for an agent and for a patch.

Needs nothing but coreutils, bash and Python, which base `host` has.
"""

from __future__ import annotations

PYTHON = "/usr/bin/python3"

PASSING: dict[str, str] = {
    "memory": "head -c 2G /dev/zero | tail >/dev/null",
    "shared memory": "head -c 2G /dev/zero > /dev/shm/bomb; rm -f /dev/shm/bomb",
    "processes": "for i in $(seq 400); do sleep 3 & done 2>/dev/null; wait",
    "disk": "head -c 1G /dev/zero > /var/tmp/bomb; rm -f /var/tmp/bomb",
    "inodes": f"{PYTHON} -c 'import os\nfor n in range(9**9): os.mkdir(f\"/var/tmp/{{n}}\")'; rm -rf /var/tmp/*",
    "output": "head -c 200M /dev/zero | tr '\\0' x",
    "output to both": "(yes | head -c 50M >&2) & yes | head -c 50M; wait",
    "open files": f"{PYTHON} -c 'import os\nwhile True: os.dup(1)'",
    "init killed": "kill -9 1; kill -TERM 1; kill -INT 1; kill -SEGV 1; true",
    "init stopped": "kill -STOP 1; kill -TSTP 1; kill -CONT 1; true",
    "descriptors closed": "(exec 0<&- 1>&- 2>&-; true)",
}
"""Over when the line is over: what comes after it works."""

DEADLY: dict[str, str] = {
    "the shell killed": "kill -9 $$",
    "the shell stopped": "kill -STOP $$",
    "its parent killed": "kill -9 $PPID; kill -STOP $PPID; kill -9 $$",
    "everything killed": "kill -9 -1",
    "the shell replaced": "exec true",
    "no end": "sleep 600",
    "a fork bomb": "bomb() { bomb | bomb & }; bomb; sleep 600",
    "memory in a variable": "x=$(head -c 2G /dev/zero | tr '\\0' x); exit 1",
}
"""The line is the end of its command, or has none."""

LASTING: dict[str, str] = {
    "a full disk": "head -c 1G /dev/zero > fill",
    "no inode": f"{PYTHON} -c 'import os\nfor n in range(9**9): os.mkdir(f\"many{{n}}\")'",
    "the system removed": "rm -rf /usr /bin /lib /lib64 /etc /srv 2>/dev/null",
    "the repository gone": "rm -rf /srv/.git /srv/* && mkfifo /srv/answer.sh",
    "no fork any more": "(trap '' TERM HUP; while :; do sleep 600 & done) >/dev/null 2>&1 & sleep 1",
}
"""What comes after it may not work."""
