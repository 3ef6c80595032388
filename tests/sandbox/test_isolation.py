"""What a sandbox keeps apart, tried from inside. The whole table of probes is the next issue's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
from tests.support import seconds

PROBE = r"""
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    r = libc.syscall(*a)
    return r if r >= 0 else -ctypes.get_errno()
print(eval(sys.argv[1]))
"""


def probe(sandbox: Sandbox, expression: str) -> str:
    result = sandbox.run(["python3", "-c", PROBE, expression], timeout=seconds(30))
    return result.output.strip()


def test_host_processes_are_out_of_sight(sandbox: Sandbox) -> None:
    victim = subprocess.Popen(["sleep", "98765"])
    try:
        assert "98765" not in sandbox.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").output
        assert sandbox.run(f"kill -0 {victim.pid}").exit_code != 0
    finally:
        victim.kill()
        victim.wait()


def test_host_files_are_out_of_sight(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret text")
    secret.chmod(0o644)
    for path in (secret, f"/proc/1/root{secret}", f"/proc/self/root{secret}"):
        assert "secret text" not in sandbox.run(["cat", str(path)]).output
    assert sandbox.run(["ls", "/host"]).exit_code != 0


def test_every_namespace_is_its_own(sandbox: Sandbox) -> None:
    for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
        inside = sandbox.run(["readlink", f"/proc/self/ns/{name}"]).output.strip()
        assert inside and inside != os.readlink(f"/proc/self/ns/{name}"), name


def test_root_inside_is_nobody_outside(sandbox: Sandbox) -> None:
    assert sandbox.run("id -u").output == "0\n"
    assert sandbox.run("cat /proc/self/uid_map").output.split()[1] != "0"
    status = Path(f"/proc/{sandbox.pid}/status").read_text()
    assert "0" not in next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]


def test_privileges_are_dropped_and_the_filter_is_on(sandbox: Sandbox) -> None:
    status = dict(
        line.split(":\t", 1) for line in sandbox.run("cat /proc/self/status").output.splitlines() if ":\t" in line
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for key in ("CapEff", "CapBnd", "CapPrm"):
        # No SYS_ADMIN (21), NET_ADMIN (12), SYS_PTRACE (19), SYS_MODULE (16), MKNOD (27), DAC_READ_SEARCH (2).
        assert int(status[key], 16) & sum(1 << bit for bit in (21, 12, 19, 16, 27, 2)) == 0


@pytest.mark.parametrize(
    "expression",
    [
        "libc.mount(b't', b'/tmp', b'tmpfs', 0, None)",
        "libc.unshare(0x10000000)",
        "libc.unshare(0x00020000)",
        "libc.ptrace(0x4206, os.getppid(), 0, 0)",
        "libc.syscall(321, 0, 0, 0)",  # bpf
        "libc.syscall(425, 1, 0)",  # io_uring_setup
        "libc.syscall(323, 1)",  # userfaultfd
        "libc.syscall(298, 0, 0, -1, -1, 0)",  # perf_event_open
        "libc.syscall(250, 0, 0)",  # keyctl
        "libc.syscall(428, -100, b'/', 1)",  # open_tree
        "libc.syscall(430, b'tmpfs', 0)",  # fsopen
        "libc.syscall(304, 0, 0, 0)",  # open_by_handle_at
        "libc.syscall(308, -1, 0)",  # setns
        "libc.chroot(b'/tmp')",
        "libc.umount2(b'/proc', 2)",
    ],
)
def test_a_dangerous_call_is_refused(sandbox: Sandbox, expression: str) -> None:
    assert probe(sandbox, f"({expression}, ctypes.get_errno())") in ("(-1, 1)", "(-1, 38)")


def test_clone3_falls_back_and_threads_work(sandbox: Sandbox) -> None:
    assert probe(sandbox, "call(435, 0, 0)") == "-38"
    script = "import threading; t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()"
    assert sandbox.run(["python3", "-c", script]).output == "thread\n"


def test_only_loopback_and_it_works(sandbox: Sandbox) -> None:
    assert probe(sandbox, "[n for _, n in socket.if_nameindex() if n == 'lo']") == "['lo']"
    script = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); "
        "print('connected')"
    )
    assert sandbox.run(["python3", "-c", script]).output == "connected\n"


def test_the_hosts_loopback_and_abstract_sockets_are_not_reached(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"minisandbox-test-{os.getpid()}"
        abstract.bind(b"\0" + name.encode())
        abstract.listen()
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
        assert "refused" in sandbox.run(["python3", "-c", code]).output.lower()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"
        assert sandbox.run(["python3", "-c", code]).exit_code != 0


@pytest.mark.parametrize("family", [17, 40, 38])  # AF_PACKET, AF_VSOCK, AF_ALG
def test_odd_socket_families_are_refused(sandbox: Sandbox, family: int) -> None:
    assert probe(sandbox, f"libc.socket({family}, 3, 0)") == "-1"


@pytest.mark.parametrize(
    "path", ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/overcommit_memory", "/proc/kmsg"]
)
def test_kernel_knobs_cannot_be_turned(sandbox: Sandbox, path: str) -> None:
    before = Path(path).read_text() if path.startswith("/proc/sys/") else ""
    sandbox.run(f"echo 7 > {path}")
    if before:
        assert Path(path).read_text() == before
        assert sandbox.run(f"test -w {path} && echo x > {path}").exit_code != 0


@pytest.mark.parametrize("name", ["kcore", "kallsyms", "keys", "timer_list", "interrupts"])
def test_kernel_secrets_are_masked(sandbox: Sandbox, name: str) -> None:
    assert sandbox.run(f"cat /proc/{name}").stdout == b""


def test_dev_is_minimal_and_has_a_working_pty(sandbox: Sandbox) -> None:
    names = set(sandbox.run("ls /dev").output.split())
    assert names == {
        "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero",
    }
    script = "import os, pty; m, s = pty.openpty(); os.write(s, b'x'); print(os.read(m, 1), os.ttyname(s))"
    assert sandbox.run(["python3", "-c", script]).output == "b'x' /dev/pts/0\n"


def test_no_descriptor_of_ours_is_inherited(sandbox: Sandbox) -> None:
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    assert sandbox.run(["python3", "-c", code]).output == "[0, 1, 2]\n"
    assert sandbox.shell().run(f'python3 -c "{code}"').output == "[0, 1, 2]\n"


def test_signals_to_init_are_ignored(sandbox: Sandbox) -> None:
    sandbox.run("for n in $(seq 1 64); do kill -$n 1; done 2>/dev/null")
    sandbox.run("kill -9 -1")
    assert sandbox.run("echo on").output == "on\n"


def test_a_link_where_a_mount_belongs_is_refused_by_name(layer: Path, spec: SandboxSpec, tmp_path: Path) -> None:
    import dataclasses

    evil = tmp_path / "evil"
    evil.mkdir(mode=0o755)
    (evil / "proc").symlink_to("/etc")
    with pytest.raises(SandboxError, match="link at /proc"):
        Sandbox(dataclasses.replace(spec, layers=(layer, evil)))


def test_a_bind_is_read_only_and_what_is_kept_is_not(sandbox: Sandbox) -> None:
    assert sandbox.run("touch /usr/bin/new").exit_code != 0
    assert sandbox.run("touch /usr/local/new && ls /usr/local").output == "new\n"


def test_two_sandboxes_share_nothing(open_sandbox: Callable[..., Sandbox]) -> None:
    one, two = open_sandbox(), open_sandbox()
    one.run("echo x > /tmp/mark; echo x > /dev/shm/mark")
    assert two.run("ls /tmp/mark /dev/shm/mark").exit_code != 0


SPY = r"""
import os, time
found = set()
while not os.path.exists("/tmp/stop"):
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                found.add(os.readlink(f"/proc/{name}/exe"))
            except OSError:
                pass
open("/tmp/found", "w").write("\n".join(found))
"""


def test_the_machines_interpreter_is_never_to_be_had(sandbox: Sandbox) -> None:
    """Between fork and exec a command is a copy of init, whose program lies outside of the sandbox."""
    sandbox.write_file("/tmp/spy.py", SPY.encode())
    sandbox.run("setsid python3 /tmp/spy.py >/dev/null 2>&1 &")
    for _ in range(300):
        sandbox.run(["/bin/true"], user="0")
    sandbox.run("touch /tmp/stop; while [ ! -s /tmp/found ]; do sleep 0.1; done", timeout=seconds(20))
    found = sandbox.read_file("/tmp/found").decode().splitlines()
    assert found and os.path.realpath(sys.executable) not in found


def test_the_limits_of_init_cannot_be_lowered(sandbox: Sandbox) -> None:
    """With no descriptor left it could not be frozen, which an agent could use to have its row masked."""
    script = "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (5, 5))"
    assert "PermissionError" in sandbox.run(["python3", "-c", script]).output
    assert sandbox.run("ulimit -n 100; ulimit -n").output == "100\n"
    sandbox.freeze()
    assert sandbox.run("echo on").output == "on\n"
