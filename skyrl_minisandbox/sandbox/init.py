"""Process 1 of a sandbox: sets the room up, checks that what was asked for is in force, then serves its owner.

It is forked from the launcher, not exec'd, so it holds nothing secret: the launcher has an empty environment. It is
single-threaded and never blocks on anything that the inside controls. Its owner's lifeline is the socket: when that
ends, so does init, and with it every process inside.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from typing import Any

from skyrl_minisandbox.sandbox import limits, linux, mounts, seccomp, wire
from skyrl_minisandbox.sandbox.serve import Server
from skyrl_minisandbox.sandbox.spawn import OomScore
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


def run_init(
    sock: socket.socket, line: socket.socket, *, network: str, single_id: bool, entries: list[int], cgroup: bool
) -> None:
    """Be init: get ready as far as that goes without a request, wait for one on `line`, go on with it. Never returns.

    entries: see `limits.join`.
    """
    score = OomScore(mounts.HOST + "/proc/self/oom_score_adj")
    failed: SetupFailed | None = None
    proc_refused: OSError | None = None
    try:
        proc_refused = _get_ready(network, single_id, entries, cgroup)
    except SetupFailed as error:
        failed = error
    except BaseException as error:
        failed = SetupFailed("getting ready", 0, repr(error))
    request, fds = _request(line)
    try:
        if failed is not None:
            raise failed
        _set_up(request, fds, single_id, proc_refused)
        server = Server(request, sock, score)
        if request["shell"] is not None:
            server.start_shell(request["shell"])
    except SetupFailed as error:
        text = f"{error.step}: {error.detail}".encode(errors="replace")[:2000]
        sock.sendall(wire.frame(Answer.FAILED, 0, wire.ERRNO.pack(error.number) + text))
        os._exit(1)
    except BaseException as error:
        sock.sendall(wire.frame(Answer.FAILED, 0, wire.ERRNO.pack(0) + repr(error).encode()[:2000]))
        os._exit(1)
    server.send_ready(request["lost"])
    try:
        server.serve()
    finally:
        os._exit(0)


def _request(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Wait for a request, and the root and the binds that come with it. The launcher's end is the end."""
    data, fds, _ = linux.receive_fds(line, 1 << 17, 254)
    if not data:
        os._exit(0)
    line.close()
    return json.loads(data), fds


def _step(name: str, execute: Any) -> None:
    try:
        execute()
    except OSError as error:
        raise SetupFailed(name, error.errno or 0, str(error)) from error


def _get_ready(network: str, single_id: bool, entries: list[int], cgroup: bool) -> OSError | None:
    """Everything that no request decides. Returns what kept us from a /proc: whether it may be missing, one says."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher's own is to ignore it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.umask(0o022)
    _step("cgroup", lambda: limits.join(entries))
    _step("root of the user namespace", _become_root)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    _step("lifeline to the launcher", lambda: linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL))
    linux.set_name("minisandbox")
    if cgroup:
        _step("cgroup namespace", lambda: linux.unshare(linux.CLONE_NEWCGROUP))
    if network == "none":
        _step("loopback", linux.loopback_up)
    _step("bounding set", lambda: linux.bound_capabilities(CAPABILITIES))
    _step("private mounts", lambda: linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE))
    proc_refused: OSError | None = None
    for step in mounts.steps_ahead(single_id):
        try:
            step.execute()
        except OSError as error:
            if step.describe != "proc at /proc":
                raise SetupFailed(step.describe, error.errno or 0, str(error)) from error
            proc_refused = error
    return proc_refused


def _set_up(request: dict[str, Any], fds: list[int], single_id: bool, proc_refused: OSError | None) -> None:
    _step("host name", lambda: socket.sethostname(request["hostname"]))
    for step in mounts.root_steps(request, fds[0], fds[1:], proc_refused):
        _step(step.describe, step.execute)
    core = limits.allowed(resource.RLIMIT_CORE, request["limits"]["core"])
    _step("core size", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, core)))
    if not request["pids_cgroup"]:
        processes_limit = request["limits"]["processes"]
        _step("process limit", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (processes_limit,) * 2))
    _step("capabilities", lambda: linux.set_capabilities(CAPABILITIES))
    _step("no_new_privs", lambda: linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))
    program = seccomp.build_filter(os.uname().machine, single_id=single_id)
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
    """Ask, then verify: what is in force, as the kernel tells it."""
    if not linux.no_new_privs():
        raise SetupFailed("verification", 0, "no_new_privs is not in force")
    if linux.seccomp_mode() != linux.SECCOMP_MODE_FILTER:
        raise SetupFailed("verification", 0, "no seccomp filter is in force")
    mask = sum(1 << capability for capability in CAPABILITIES)
    wanted = {"effective": mask, "permitted": mask, "inheritable": 0, "bounding": mask}
    found = linux.capabilities()
    if found != wanted:
        raise SetupFailed("verification", 0, f"capabilities are {found}, asked for {wanted}")
    _verify_place(request)


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
