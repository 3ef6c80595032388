"""Attempts to reach what is the machine's: its processes, files, sockets, settings, devices and network."""

from __future__ import annotations

import os
import pty
import socket
import stat
import struct
from typing import Any

from skyrl_minisandbox.sandbox.check.attempts import WEAK, Lacking, Outcome, attempt, libc, opens, read

SECRETS = (
    "kcore", "kallsyms", "keys", "kmsg", "timer_list", "interrupts", "slabinfo", "vmallocinfo", "sched_debug",
    "kpagecount", "kpageflags", "softirqs", "schedstat",
)
KNOBS = (
    "sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/vm/overcommit_memory", "sys/fs/file-max", "sysrq-trigger",
    "irq/default_smp_affinity",
)
_TUNNELS = ("tunl", "gre", "sit", "ip6", "ip_vti", "erspan")  # dead interfaces that some kernels bring everywhere

# What the machine planted


@attempt("host-processes", "no process of the machine is in sight", trap=True)
def host_processes(known: dict[str, Any]) -> Outcome:
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(name) != os.getpid() and known["argument"] in read(f"/proc/{name}/cmdline"):
                return f"process {name} is the machine's"
        except OSError:
            continue
    return None


@attempt("host-signal", "no process of the machine can be signalled", trap=True)
def host_signal(known: dict[str, Any]) -> Outcome:
    os.kill(known["victim"], 0)
    # The number may be somebody's inside; then it is not the machine's.
    return None if host_processes(known) is None else f"process {known['victim']} can be signalled"


@attempt("host-file", "no file of the machine is read", trap=True)
def host_file(known: dict[str, Any]) -> Outcome:
    for path in (known["secret"], f"/proc/1/root{known['secret']}", f"/proc/self/cwd/../../../..{known['secret']}"):
        try:
            if known["text"] in read(path):
                return f"{path} is read"
        except OSError:
            continue
    return None


@attempt("host-shm", "/dev/shm is its own", trap=True)
def host_shm(known: dict[str, Any]) -> Outcome:
    return f"{known['shm']} is in sight" if os.path.exists(known["shm"]) else None


@attempt("host-sysv", "no System V segment of the machine is reached", trap=True)
def host_sysv(known: dict[str, Any]) -> Outcome:
    return "a segment of the machine is reached" if libc.shmget(known["key"], 0, 0) >= 0 else None


def _connect(family: int, address: Any) -> Outcome:
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(address)
    return "connected"


@attempt("host-tcp", "no server on the machine's 127.0.0.1 is reached", trap=True)
def host_tcp(known: dict[str, Any]) -> Outcome:
    return _connect(socket.AF_INET, ("127.0.0.1", known["port"]))


@attempt("host-abstract", "no abstract socket of the machine is reached", trap=True)
def host_abstract(known: dict[str, Any]) -> Outcome:
    return _connect(socket.AF_UNIX, "\0" + known["abstract"])


@attempt("host-socket", "no socket file of the machine is reached", trap=True)
def host_socket(known: dict[str, Any]) -> Outcome:
    return _connect(socket.AF_UNIX, known["socket"])


@attempt("host-environment", "no variable of the owner is read", trap=True)
def host_environment(known: dict[str, Any]) -> Outcome:
    places = ["/proc/self/environ", *(f"/proc/{name}/environ" for name in os.listdir("/proc") if name.isdigit())]
    for path in places:
        try:
            if known["token"] in read(path):
                return f"{path} has a variable of the owner"
        except OSError:
            continue
    return "a variable of the owner is here" if known["token"] in os.environ.values() else None


@attempt("namespaces", "every namespace is its own", trap=True)
def namespaces(known: dict[str, Any]) -> Outcome:
    shared = []
    for name, link in known["namespaces"].items():
        try:
            if os.readlink(f"/proc/self/ns/{name}") == link:
                shared.append(name)
        except FileNotFoundError as error:
            raise Lacking("/proc is empty inside") from error
    return f"shared with the machine: {', '.join(shared)}" if shared else None


# /proc, /dev, /sys


@attempt("own-processes", "few processes, all its own")
def process_one(known: dict[str, Any]) -> Outcome:
    count = sum(name.isdigit() for name in os.listdir("/proc"))
    return f"{count} processes are in sight" if count >= 20 else None


@attempt("init-closed", "init cannot be looked into")
def init_closed(known: dict[str, Any]) -> Outcome:
    names = ("environ", "mem", "maps", "smaps", "auxv", "exe", "map_files", "fdinfo")
    found = opens([f"/proc/1/{name}" for name in names], os.O_RDONLY)
    found += opens(["/proc/1/mem"], os.O_RDWR)
    for name in ("fd", "cwd", "root"):
        try:
            os.listdir(f"/proc/1/{name}")
            found.append(f"/proc/1/{name}")
        except OSError:
            continue
    return f"open to the inside: {', '.join(found)}" if found else None


@attempt("shell-memory", "the shell's memory is closed to its commands")
def parent_memory(known: dict[str, Any]) -> Outcome:
    os.close(os.open(f"/proc/{os.getppid()}/mem", os.O_RDWR))
    return WEAK, "it opens, to commands of the same user"


@attempt("proc-masks", "kernel secrets below /proc are masked")
def proc_masks(known: dict[str, Any]) -> Outcome:
    found = []
    for name in SECRETS:
        try:
            text = read(f"/proc/{name}", 4096)
        except OSError:
            continue
        if text and not (name == "kallsyms" and text.startswith("0" * 16)):
            found.append(name)
    return f"readable: {', '.join(found)}" if found else None


@attempt("proc-read-only", "kernel settings cannot be written")
def proc_read_only(known: dict[str, Any]) -> Outcome:
    found = opens([f"{root}/{name}" for name in KNOBS for root in ("/proc", "/proc/1/root/proc")], os.O_WRONLY)
    return f"opens for writing: {', '.join(found)}" if found else None


@attempt("sys-closed", "no /sys, cgroup or debug file system is open")
def sys_read_only(known: dict[str, Any]) -> Outcome:
    found = opens(["/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state"], os.O_WRONLY)
    for path in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"):
        try:
            os.mkdir(f"{path}/minisandbox-attempt")
            os.rmdir(f"{path}/minisandbox-attempt")
            found.append(path)
        except OSError:
            continue
    found += [path for path in ("/sys/kernel/debug", "/sys/kernel/tracing") if os.path.isdir(path) and os.listdir(path)]
    return f"open to the inside: {', '.join(found)}" if found else None


@attempt("dev-minimal", "/dev holds harmless devices only")
def dev_minimal(known: dict[str, Any]) -> Outcome:
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"}
    odd = []
    for name in os.listdir("/dev"):
        mode = os.lstat(f"/dev/{name}").st_mode
        if (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)) and name not in harmless:
            odd.append(name)
    return f"device nodes: {', '.join(sorted(odd))}" if odd else None


@attempt("making-devices", "no device can be made and opened")
def making_devices(known: dict[str, Any]) -> Outcome:
    path = f"/tmp/device-{os.getpid()}"
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(*known["disk"]))
    try:
        return "the machine's disk opens" if opens([path], os.O_RDONLY) else None
    finally:
        os.unlink(path)


@attempt("binds-read-only", "what is bound read-only is")
def binds_read_only(known: dict[str, Any]) -> Outcome:
    path = f"/usr/bin/minisandbox-attempt-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    os.unlink(path)
    return "the machine's /usr can be written"


# Network


@attempt("interfaces", "no interface beside loopback")
def interfaces(known: dict[str, Any]) -> Outcome:
    odd = [name for _, name in socket.if_nameindex() if name != "lo" and not name.startswith(_TUNNELS)]
    return f"interfaces beside lo: {', '.join(odd)}" if odd else None


@attempt("odd-sockets", "no raw, packet, vsock or crypto socket")
def odd_sockets(known: dict[str, Any]) -> Outcome:
    through = []
    for name, family, kind in (("AF_PACKET", 17, 3), ("AF_ALG", 38, 5), ("AF_VSOCK", 40, 1), ("raw", 2, 3)):
        try:
            socket.socket(family, kind, 1 if name == "raw" else 0).close()
            through.append(name)
        except OSError:
            continue
    return f"open: {', '.join(through)}" if through else None


@attempt("network-settings", "no interface can be made")
def network_settings(known: dict[str, Any]) -> Outcome:
    kind = b"dummy\0\0\0"  # rtnetlink(7): RTM_NEWLINK with IFLA_LINKINFO { IFLA_INFO_KIND }
    info = struct.pack("HH", 4 + len(kind), 1) + kind
    body = struct.pack("BxHiII", 0, 0, 0, 0, 0) + struct.pack("HH", 4 + len(info), 18) + info
    header = struct.pack("IHHII", 16 + len(body), 16, 0x605, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(5)
        sock.send(header + body)
        (code,) = struct.unpack_from("i", sock.recv(4096), 16)
    return "an interface can be made" if code == 0 else None


# What must work


@attempt("loopback", "a server on loopback answers", works=True)
def loopback(known: dict[str, Any]) -> Outcome:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), 5).close()
    return None


@attempt("pty", "a terminal can be had", works=True)
def terminals(known: dict[str, Any]) -> Outcome:
    pid, master = pty.fork()
    if pid == 0:
        os.write(1, b"%d %s" % (os.isatty(0), os.ttyname(0).encode()))
        os._exit(0)
    text = os.read(master, 100)
    os.waitpid(pid, 0)
    os.close(master)
    return None if text.startswith(b"1 /dev/pts/") else f"a pty says {text!r}"
