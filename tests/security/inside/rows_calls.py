"""n: the network; i: ipc and namespaces; s: system calls that reach deep into the kernel."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import struct
from typing import Any

from .common import BAD, OK, WEAK, Verdict, call, check, in_child, libc, refused, row

_CLONE_NEWUSER = 0x10000000
_IPC_CREAT = 0o1000
_TUNNELS = ("lo", "tunl", "gre", "sit", "ip6", "ip_vti", "erspan")


def _connects(family: int, address: Any) -> Verdict:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        sock.connect(address)
    return BAD, "connected"


@row("n01")
def _tcp(facts: dict[str, Any]) -> Verdict:
    return _connects(socket.AF_INET, ("127.0.0.1", facts["port"]))


@row("n02")
def _abstract(facts: dict[str, Any]) -> Verdict:
    return _connects(socket.AF_UNIX, b"\0" + facts["abstract"].encode())


@row("n03")
def _path_socket(facts: dict[str, Any]) -> Verdict:
    return _connects(socket.AF_UNIX, facts["socket"])


@row("n04")
def _interfaces(facts: dict[str, Any]) -> Verdict:
    names = [name for _, name in socket.if_nameindex()]
    left = [name for name in names if name != "lo" and not name.startswith(_TUNNELS[1:])]
    return (BAD, " ".join(left)) if left else (OK, "none left")


@row("n05")
def _packet(facts: dict[str, Any]) -> Verdict:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3).close()
    return WEAK, "opens"


@row("n06")
def _vsock(facts: dict[str, Any]) -> Verdict:
    socket.socket(40, socket.SOCK_STREAM, 0).close()
    return WEAK, "opens"


@row("n07")
def _loopback(facts: dict[str, Any]) -> Verdict:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), 1).close()
    return OK, "connected"  # an error is OK too by this row's rule; the test wants this word


def _netlink(kind: int, flags: int, body: bytes) -> None:
    """One rtnetlink request. Raises `OSError` with the kernel's answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(1)
        sock.sendto(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body, (0, 0))
        answer = sock.recv(4096)
    code = -int(struct.unpack_from("i", answer, 16)[0])
    if code:
        raise OSError(code, os.strerror(code))


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


@row("n08")
def _net_admin(facts: dict[str, Any]) -> Verdict:
    # linux/rtnetlink.h: RTM_NEWLINK 16, RTM_DELLINK 17, RTM_NEWADDR 20; REQUEST 1, ACK 4, EXCL 0x200, CREATE 0x400
    name = _attribute(3, b"probe0\0")
    head = struct.pack("BxHiII", 0, 0, 0, 0, 0)
    try:
        _netlink(16, 0x605, head + name + _attribute(18, _attribute(1, b"dummy")))
    except OSError as error:
        told = error
    else:
        _netlink(17, 5, head + name)
        return WEAK, "a dummy link was made"
    # Beyond what the row asks: this needs no driver.
    address = socket.inet_aton("127.66.66.66")
    body = struct.pack("BBBBi", socket.AF_INET, 32, 0, 0, socket.if_nametoindex("lo"))
    try:
        _netlink(20, 0x605, body + _attribute(2, address) + _attribute(1, address))
    except OSError:
        raise told from None
    return WEAK, "an address was added to lo"


@row("i01")
def _sysv(facts: dict[str, Any]) -> Verdict:
    return BAD, f"id {check(libc.shmget(facts['shm_key'], 0, 0))}"


@row("i02")
def _shm(facts: dict[str, Any]) -> Verdict:
    os.lstat(facts["shm_canary"])
    return BAD, "the canary is there"


@row("i03")
def _namespaces(facts: dict[str, Any]) -> Verdict:
    shared = []
    for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
        try:
            if os.readlink(f"/proc/self/ns/{name}") == facts["namespaces"][name]:
                shared.append(name)
        except OSError:
            continue
    if not shared:
        return OK, "all differ"
    return (WEAK if shared == ["user"] else BAD), "shared: " + " ".join(shared)


@row("i04")
def _keyring(facts: dict[str, Any]) -> Verdict:
    return WEAK, f"key {call('add_key', b'user', b'x', b'x', 1, -3)}"


@row("s01")
def _bpf(facts: dict[str, Any]) -> Verdict:
    attributes = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 8, 1), 128)
    return refused(lambda: call("bpf", 0, attributes, 128), descriptor=True)


@row("s02")
def _perf(facts: dict[str, Any]) -> Verdict:
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 112, 0), 112)
    return refused(lambda: call("perf_event_open", attributes, 0, -1, -1, 0), descriptor=True)


@row("s03")
def _userfaultfd(facts: dict[str, Any]) -> Verdict:
    verdict = refused(lambda: call("userfaultfd", 0), descriptor=True)
    # Beyond what the row asks: UFFD_USER_MODE_ONLY is open to every user.
    return verdict if verdict[0] != OK else refused(lambda: call("userfaultfd", 1), descriptor=True)


@row("s04")
def _io_uring(facts: dict[str, Any]) -> Verdict:
    parameters = ctypes.create_string_buffer(120)
    return refused(lambda: call("io_uring_setup", 1, parameters), descriptor=True)


@row("s05")
def _module(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("init_module", None, 0, b""))


@row("s06")
def _kexec(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("kexec_load", 0, 0, None, 0xFFFF))


@row("s07")
def _reboot(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("reboot", 0, 0, 0, None))


@row("s08")
def _swapon(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("swapon", b"/nonexist", 0))


@row("s09")
def _acct(facts: dict[str, Any]) -> Verdict:
    # A path that does not exist has the same verdicts as NULL, and ends nobody's accounting.
    return refused(lambda: call("acct", b"/nonexist/acct"))


@row("s10")
def _clock(facts: dict[str, Any]) -> Verdict:
    timex = ctypes.create_string_buffer(struct.pack("Iiq", 1, 0, 0), 256)
    return refused(lambda: call("adjtimex", timex))


@row("s11")
def _setns(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("setns", -1, 0))


@row("s12")
def _pivot_root(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("pivot_root", b"/none", b"/none"))


@row("s13")
def _fsopen(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("fsopen", b"tmpfs", 0), descriptor=True)


@row("s14")
def _open_tree(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("open_tree", -100, b"/", 1), descriptor=True)


@row("s15")
def _mount_setattr(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("mount_setattr", -1, b"", 0, None, 0))


@row("s16")
def _pidfd_getfd(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("pidfd_getfd", 0, 0, 0), descriptor=True)


@row("s17")
def _vm_readv(facts: dict[str, Any]) -> Verdict:
    return refused(lambda: call("process_vm_readv", os.getppid(), None, 0, None, 0, 0))


@row("s18")
def _nested(facts: dict[str, Any]) -> Verdict:
    text, _ = in_child(lambda: str(check(libc.unshare(_CLONE_NEWUSER))))
    return (WEAK, "a user namespace was made") if text == "0" else (OK, text)


@row("s19")
def _clone(facts: dict[str, Any]) -> Verdict:
    arguments = ctypes.create_string_buffer(struct.pack("QQQQQ", _CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD), 64)
    verdict = OK, "refused"
    # clone(2) is beyond what the row asks.
    for name, first in (("clone3", arguments), ("clone", _CLONE_NEWUSER | signal.SIGCHLD)):
        try:
            pid = call(name, first, 64 if name == "clone3" else 0, 0, 0, 0)
        except OSError:
            continue
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        verdict = WEAK, "a child with a user namespace was made"
    return verdict


@row("s20")
def _x32(facts: dict[str, Any]) -> Verdict:
    if platform.machine() != "x86_64":
        return OK, "no such ABI here"
    text, status = in_child(lambda: str(call(0x40000000 + 39)))
    if os.WIFSIGNALED(status):
        return OK, "killed"
    return (BAD, text) if text.isdigit() and int(text) > 0 else (OK, text)
