"""The table of verdicts in `docs/security.md`: `python -m tests.security.table --guest-root FILE --guest-user FILE`.

Runs the suite as root and as an ordinary user made for it, and writes the table between its two markers. The columns of
another kernel come from files that a run there kept (MINISANDBOX_SECURITY_RESULTS=DIR with `pytest tests/security`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.security import traps
from tests.security.suite import run_suite
from tests.support import REPOSITORY, OrdinaryUser, ordinary_user, seconds

DOCUMENT = REPOSITORY / "docs/security.md"
BEGIN, END = "<!-- probes: begin (python -m tests.security.table) -->", "<!-- probes: end -->"

ROWS: dict[str, str] = {
    "p01": "host process visible in /proc", "p02": "signal a host process", "p03": "ptrace a host process",
    "p04": "/proc/1/root leads to host fs", "p05": "pid 1 is ours (pid namespace)",
    "p06": "memory of the control shell through /proc", "p07": "ptrace own parent (control shell)",
    "f01": "read host secret file by path", "f02": "host /root and /home visible", "f03": "/etc/shadow is the host's",
    "f04": "write into host /tmp", "f05": "other sandboxes' state visible", "f06": "container engine sockets visible",
    "f07": "mount(2) tmpfs", "f08": "umount /proc masks", "f09": "mknod block device, open host disk",
    "f10": "host disk and memory devices in /dev", "f11": "classic chroot escape",
    "f12": "open_by_handle_at (shocker)", "f13": "/proc/sys writable", "f14": "/proc/sysrq-trigger writable",
    "f15": "/sys writable", "f16": "cgroup file system writable", "f17": "cgroup release_agent writable",
    "f18": "debugfs, tracefs, securityfs reachable", "k01": "/proc/kcore readable",
    "k02": "/proc/kallsyms real addresses", "k03": "/proc/keys readable", "k04": "/proc/timer_list readable",
    "k05": "/proc/interrupts readable", "k06": "/proc/kmsg readable", "k07": "syslog(2)",
    "n01": "connect to host 127.0.0.1", "n02": "connect to host abstract socket", "n03": "connect to host path socket",
    "n04": "interfaces besides lo", "n05": "AF_PACKET raw socket", "n06": "AF_VSOCK (hypervisor channel)",
    "n07": "loopback usable inside", "n08": "CAP_NET_ADMIN", "i01": "host SysV memory visible",
    "i02": "host /dev/shm shared", "i03": "namespaces shared with host", "i04": "keyring", "s01": "bpf",
    "s02": "perf_event_open", "s03": "userfaultfd", "s04": "io_uring_setup", "s05": "init_module", "s06": "kexec_load",
    "s07": "reboot", "s08": "swapon", "s09": "acct", "s10": "clock adjustment", "s11": "setns", "s12": "pivot_root",
    "s13": "fsopen", "s14": "open_tree(clone)", "s15": "mount_setattr", "s16": "pidfd_getfd",
    "s17": "process_vm_readv", "s18": "nested user namespace by unshare", "s19": "nested user namespace by clone3",
    "s20": "x32/i386 system calls", "h01": "no_new_privs", "h02": "seccomp filter", "h03": "capabilities",
    "h04": "real uid on host", "h05": "inherited descriptors", "h06": "secrets in environment", "h07": "TIOCSTI",
    "h08": "core dumps", "l01": "processes limit (≤ 700)", "l02": "memory limit (≤ 700 MB)",
    "l03": "disk limit (≤ 400 MB)", "l04": "rlimits", "r01": "background process outlives the sandbox",
    "r02": "base environment writable", "r03": "future history in git", "r04": "own PATH and /etc writable",
}
NAMES: Sequence[str] = tuple(ROWS)

# Accepted by name. r04: its own /etc and PATH in a disposable sandbox; h03: a small set for package managers; p06:
# the memory of its own shell.
_ACCEPTED = frozenset({"r04", "h03", "p06"})


@dataclasses.dataclass(frozen=True)
class Peer:
    """Verdicts of a peer with its defaults for a shell over a root file system, measured in November 2026 on Linux
    6.18, root-inside, without limits. `bad` and `weak` are rows; what is left was refused."""

    name: str
    bad: str
    weak: str

    @property
    def verdicts(self) -> dict[str, str]:
        found = dict.fromkeys(NAMES, "OK") | {"l04": "INFO"}
        found |= dict.fromkeys(self.weak.split(), "WEAK") | dict.fromkeys(self.bad.split(), "BAD")
        return found


PEERS = (
    Peer(
        "unshare, binds, chroot",
        "p01 p02 p03 p05 f01 f04 f06 f10 f11 f12 f13 f15 n01 n02 n03 n04 i01 i03 h03 r01",
        "p06 p07 f07 f08 k02 k03 k04 k05 k06 k07 n05 n06 i04 s01 s02 s03 s04 s07 s08 s09 s10 s11 s12 s13 s14 s15 s16 "
        "s17 h01 h02 h04 h08 l01 l02 r03",
    ),
    Peer(
        "bubblewrap", "f08 f13 h03",
        "p06 p07 f07 k03 k04 k05 n05 n06 i04 s04 s07 s11 s12 s13 s14 s15 s16 s17 s18 s19 h02 h04 h08 l01 l02 l03 "
        "r04",
    ),
    Peer("runc", "", "p06 k05 n06 i03 s04 s15 s16 s17 s19 h03 h04 h08 l01 l02 l03 r04"),
    Peer("docker", "f16", "p06 p07 k05 n05 n06 i03 s04 h01 h03 h04 h08 l01 l02 l03 r04"),
    Peer("podman", "f16", "p06 p07 k05 n05 n06 i03 s11 s15 s16 s17 s18 s19 h01 h03 h04 h08 l02 l03 r04"),
    Peer("nitrobox", "f15 h05", "p06 p07 n06 i03 s15 s16 h03 h04 h08 l01 l02 l03 r04"),
    Peer("gVisor", "f10 f14", "f08 f12 k07 s02 s11 s17 s18 s19 h01 h02 h03 h04 l01 l02 l03 r04"),
)


def accepted(found: Mapping[str, Any]) -> frozenset[str]:
    """Rows that may be WEAK where these verdicts come from."""
    machine = found["machine"]
    rows = _ACCEPTED
    if machine.get("uid") and not machine.get("memory_cgroup"):
        rows |= {"l02"}
    if not machine.get("tmpfs_upper", True):
        rows |= {"l03"}
    return rows


def unaccepted(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(who, row, verdict, detail) of what must not be so."""
    wrong = []
    for who in ("root", "user"):
        for name, (verdict, detail) in (found[who] or {}).items():
            fine = verdict == "OK" or (name, verdict) == ("l04", "INFO") or (
                verdict == "WEAK" and name in accepted(found)
            )
            if not fine:
                wrong.append((who, name, verdict, detail))
    return wrong


def worst(found: Mapping[str, Any], name: str) -> str:
    """The worse verdict of root-inside and a user-inside."""
    order = ("INFO", "OK", "WEAK", "BAD", "ERR")
    verdicts: list[str] = [found[who][name][0] for who in ("root", "user") if found[who] is not None]
    return max(verdicts, key=order.index)


def totals(found: Mapping[str, Any]) -> tuple[int, int]:
    """(BAD, WEAK) of 80."""
    verdicts = [worst(found, name) for name in NAMES]
    return verdicts.count("BAD"), verdicts.count("WEAK")


def keep(found: Mapping[str, Any]) -> None:
    """Write what was found where MINISANDBOX_SECURITY_RESULTS says: `root.json` or `user.json`."""
    directory = os.environ.get("MINISANDBOX_SECURITY_RESULTS")
    if directory:
        name = "user" if found["machine"]["uid"] else "root"
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, f"{name}.json").write_text(json.dumps(found))


def render(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown. columns: heading -> verdicts; the first two headings are `root` and `user`."""
    heads = [*columns, *(peer.name for peer in PEERS)]
    lines = [f"| probe | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]

    def shown(verdict: str) -> str:
        return f"**{verdict}**" if verdict in ("BAD", "ERR") else verdict

    for name, text in ROWS.items():
        cells = [worst(found, name) for found in columns.values()] + [peer.verdicts[name] for peer in PEERS]
        lines.append(f"| {name} {text} | {' | '.join(map(shown, cells))} |")
    counts = [totals(found) for found in columns.values()]
    for peer in PEERS:
        verdicts = list(peer.verdicts.values())
        counts.append((verdicts.count("BAD"), verdicts.count("WEAK")))
    lines.append(f"| **BAD / WEAK** | {' | '.join(f'**{bad} / {weak}**' for bad, weak in counts)} |")
    for heading, found in columns.items():
        machine = found["machine"]
        inside = "root inside only, as one id is mapped; a user inside: not run" if found["user"] is None else (
            "the worse of root inside and a user inside"
        )
        memory = "memory cgroup" if machine["memory_cgroup"] else "no memory cgroup, rlimits instead"
        upper = "tmpfs" if machine["tmpfs_upper"] else "disk"
        lines += ["", f"`{heading}`: Linux {machine['kernel'].split('-')[0]}, {memory}, upper on {upper}; {inside}."]
    return "\n".join(lines)


def shown_verdicts(document: str) -> dict[str, dict[str, str]]:
    """Column -> row -> verdict, read back from the document."""
    lines = document.split(BEGIN)[1].split(END)[0].strip().splitlines()
    cells = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    heads = cells[0][1:]
    body = {row[0].split()[0]: row[1:] for row in cells[2:]}
    return {head: {name: body[name][index] for name in NAMES} for index, head in enumerate(heads)}


def as_a_user(user: OrdinaryUser, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The suite, run by an ordinary user of this machine."""
    with tempfile.TemporaryFile("w+") as file:
        json.dump(facts, file)
        file.flush()
        file.seek(0)
        done = user.run(
            [user.python, "-m", "tests.security.suite"], stdin=file, timeout=seconds(300), check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--guest-root", "--guest-user"):
        parser.add_argument(option, type=Path, help="verdicts that a run in the guest kept")
    given = parser.parse_args()
    with traps.Traps() as planted:
        columns: dict[str, Any] = {"root": run_suite(planted.facts)}
        with ordinary_user() as user:
            columns["user"] = as_a_user(user, planted.facts)
    for heading, path in (("root", given.guest_root), ("user", given.guest_user)):
        if path is not None:
            found = json.loads(path.read_text())
            kernel = ".".join(found["machine"]["kernel"].split(".")[:2])
            columns[f"{heading}, {kernel}"] = found
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{render(columns)}\n{END}{after}")
    for heading, found in columns.items():
        bad, weak = totals(found)
        print(f"{heading}: {bad} BAD, {weak} WEAK; not accepted: {unaccepted(found) or 'nothing'}")


if __name__ == "__main__":
    main()
