"""Process 1 of a sandbox: sets the room up, checks that what was asked for is in force, then serves its owner.

It is forked from the launcher, not exec'd, so it holds nothing secret: the launcher has an empty environment. It is
single-threaded and never blocks on anything that the inside controls. Its owner's lifeline is the socket: when that
ends, so does init, and with it every process inside.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from typing import Any

from skyrl_minisandbox.sandbox import limits, linux, mounts, seccomp, wire
from skyrl_minisandbox.sandbox.processes import OomScore
from skyrl_minisandbox.sandbox.serve import Server
from skyrl_minisandbox.sandbox.wire import Answer

# What package managers and test suites need, no more: no SYS_ADMIN, NET_ADMIN, NET_RAW, MKNOD, SYS_PTRACE, SYS_CHROOT.
CAPABILITIES = (
    linux.CAP_CHOWN, linux.CAP_DAC_OVERRIDE, linux.CAP_FOWNER, linux.CAP_FSETID, linux.CAP_KILL, linux.CAP_SETGID,
    linux.CAP_SETUID, linux.CAP_SETPCAP, linux.CAP_NET_BIND_SERVICE, linux.CAP_SETFCAP,
)


class SetupFailed(Exception):
    """A step of setting up did not work; `step` names it."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        super().__init__(detail)
        self.step, self.number, self.detail = step, number, detail


def run_init(request: dict[str, Any], sock: socket.socket, root_fd: int, bind_fds: list[int]) -> None:
    """Be init. Never returns."""
    score = OomScore(mounts.HOST + "/proc/self/oom_score_adj")
    try:
        _set_up(request, root_fd, bind_fds)
    except SetupFailed as error:
        text = f"{error.step}: {error.detail}".encode(errors="replace")[:2000]
        sock.sendall(wire.frame(Answer.FAILED, 0, wire.ERRNO.pack(error.number) + text))
        os._exit(1)
    except BaseException as error:
        sock.sendall(wire.frame(Answer.FAILED, 0, wire.ERRNO.pack(0) + repr(error).encode()[:2000]))
        os._exit(1)
    sock.sendall(wire.frame(Answer.READY, 0, ",".join(request["lost"]).encode()))
    try:
        Server(request, sock, score).serve()
    finally:
        os._exit(0)


def _step(name: str, execute: Any) -> None:
    try:
        execute()
    except OSError as error:
        raise SetupFailed(name, error.errno or 0, str(error)) from error


def _set_up(request: dict[str, Any], root_fd: int, bind_fds: list[int]) -> None:
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.umask(0o022)
    _step("cgroup", lambda: limits.join(request["entries"]))
    _step("root of the user namespace", _become_root)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    _step("lifeline to the launcher", lambda: linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL))
    linux.set_name("minisandbox")
    if request["cgroup"]:
        _step("cgroup namespace", lambda: linux.unshare(linux.CLONE_NEWCGROUP))
    _step("host name", lambda: socket.sethostname(request["hostname"]))
    if request["network"] == "none":
        _step("loopback", linux.loopback_up)
    _step("private mounts", lambda: linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE))
    for step in mounts.root_steps(request, root_fd, bind_fds):
        _step(step.describe, step.execute)
    _step("core size", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, request["limits"]["core"])))
    if not request["pids_cgroup"]:
        processes_limit = request["limits"]["processes"]
        _step("process limit", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (processes_limit,) * 2))
    _step("capabilities", lambda: linux.set_capabilities(CAPABILITIES))
    _step("no_new_privs", lambda: linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))
    program = seccomp.build_filter(os.uname().machine, single_id=request["single_id"])
    _step("seccomp filter", lambda: linux.set_seccomp(program))
    _verify(request)


def _become_root() -> None:
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    try:
        os.setgroups([])
    except PermissionError:
        pass  # a single-id map denies setgroups; there are no groups to drop in it either


def _verify(request: dict[str, Any]) -> None:
    """Ask, then verify: read back from inside what is in force."""
    if "proc" in request["lost"]:
        if not (linux.no_new_privs() and linux.seccomp_mode() == linux.SECCOMP_MODE_FILTER):
            raise SetupFailed("verification", 0, "no_new_privs or the filter is not in force")
    else:
        _verify_status()
    _verify_place(request)


def _verify_status() -> None:
    status = {}
    with open("/proc/self/status") as file:
        for line in file:
            key, _, value = line.partition(":")
            status[key] = value.strip()
    mask = f"{sum(1 << capability for capability in CAPABILITIES):016x}"
    wanted = {"NoNewPrivs": "1", "Seccomp": "2", "CapBnd": mask, "CapEff": mask, "CapInh": "0" * 16}
    for key, value in wanted.items():
        if status.get(key) != value:
            raise SetupFailed("verification", 0, f"{key} is {status.get(key)}, asked for {value}")


def _verify_place(request: dict[str, Any]) -> None:
    if os.getpid() != 1:
        raise SetupFailed("verification", 0, f"init is process {os.getpid()}, not 1")
    if request["network"] == "none":
        names = [name for _, name in socket.if_nameindex()]
        # Kernels with built-in tunnels bring dead interfaces of these names into every network namespace.
        odd = [n for n in names if n != "lo" and not n.startswith(("tunl", "gre", "sit", "ip6", "ip_vti", "erspan"))]
        if odd:
            raise SetupFailed("verification", 0, f"network interfaces {odd} are in sight")
    try:
        linux.unshare(linux.CLONE_NEWUSER)
    except PermissionError:
        pass
    else:
        raise SetupFailed("verification", 0, "a user namespace could be made")
    if os.path.exists(mounts.HOST + "/proc") and os.path.exists(mounts.HOST + "/dev/null"):
        raise SetupFailed("verification", 0, "the host's file system is still in sight")
