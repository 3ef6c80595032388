"""x01 to x06, x10, x13 to x15, x22 to x26, x29: attempts on init, on what the host looks at, and on the shell."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import Bind, Sandbox, SandboxSpec
from tests.machine import descendants
from tests.security import traps
from tests.security.conftest import Yard, within
from tests.security.inside.common import VARIABLE
from tests.support import needs, seconds

MIB = 1 << 20


def test_init_shows_nothing_of_itself(yard: Yard, who: str | None) -> None:
    """x02 to x06: its memory, descriptors, program, directories and maps."""
    found = yard.rows(yard.open(), "x02", "x03", "x04", "x05", "x06", user=who)
    assert {name for name, (verdict, _) in found.items() if verdict != "OK"} == set(), found


def test_the_launchers_environment_is_in_no_process(yard: Yard, who: str | None) -> None:
    """x01: in no process between fork and exec either."""
    sandbox = yard.open()
    shell = sandbox.shell(user=who, cwd="/tmp", env={"PYTHONPATH": "/opt/probes"})
    facts = {VARIABLE: json.dumps({**yard.facts, "spin": True})}
    spinner = sandbox.shell(user=who, cwd="/tmp", env={"PYTHONPATH": "/opt/probes", **facts})
    assert spinner.run("setsid python3 -B -m inside.hostile x01 >/tmp/x01.out 2>&1 & echo $!").exit_code == 0
    for _ in range(60):
        sandbox.run(["true"])
        shell.run("true")
    shell.run("touch /tmp/x01.stop")
    done = shell.run("while ! [ -s /tmp/x01.out ]; do sleep 0.05; done; cat /tmp/x01.out", timeout=seconds(30))
    assert '"OK"' in done.output, done.output


def _sockets(pid: int) -> set[str]:
    """The sockets that a process holds, by inode; as root."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return {link for link in links if link.startswith("socket:")}


def test_no_sandbox_reaches_the_socket_of_another(yard: Yard, who: str | None) -> None:
    """x10"""
    one, two = yard.open(), yard.open()
    facts: dict[str, Any] = {}
    if os.geteuid() == 0:
        held = [_sockets(sandbox.pid) for sandbox in (one, two, yard.witness)]
        assert [len(sockets) for sockets in held] == [1, 1, 1] and len(set.union(*held)) == 3
        facts["sockets"] = sorted(set.union(*held))
    for sandbox in (one, two):
        assert yard.rows(sandbox, "x10", user=who, **facts)["x10"][0] == "OK"


def test_core_pattern_cannot_be_written(yard: Yard, who: str | None) -> None:
    """x15"""
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    verdict = yard.rows(yard.open(), "x15", user=who)["x15"]
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before
    assert verdict[0] == "OK", verdict


def _told(attempt: Callable[[], Any]) -> Any:
    """What an attempt gives, or its error: both are answers. Never a hang, never another exception."""
    try:
        return within(30, attempt)
    except (OSError, SandboxGone) as error:
        return error


def _use_everything(sandbox: Sandbox, path: str, place: Path) -> None:
    """Everything on the host's side that looks at a path inside, within bounds."""
    assert isinstance(_told(lambda: sandbox.read_file(path, limit=MIB)), OSError)
    assert isinstance(_told(lambda: sandbox.write_file(path, b"x" * 100)), OSError | None)
    got = _told(lambda: sandbox.get_tree(path, place / "one", max_bytes=MIB, max_members=100))
    assert isinstance(got, OSError | list)
    got = _told(lambda: sandbox.get_tree("/testbed/odd", place / "tree", max_bytes=MIB, max_members=100))
    assert isinstance(got, OSError | list)
    changes = _told(lambda: sandbox.changes())
    assert isinstance(changes, list), changes
    exported = _told(lambda: sandbox.export_layer(io.BytesIO(), max_bytes=4 * MIB))
    assert exported is None or (isinstance(exported, OSError) and exported.errno == errno.EFBIG), exported
    for directory, _, names in os.walk(place):
        for name in names:
            file = Path(directory, name)
            assert file.is_symlink() or file.is_file(), f"{file} is no file"
            assert file.is_symlink() or file.lstat().st_size <= MIB
    source = place / "source"
    source.write_text("from the host")
    assert isinstance(_told(lambda: sandbox.put_tree(source, path)), OSError | list)
    assert sandbox.run("echo on", timeout=seconds(20)).output == "on\n"
    snapshot = _told(lambda: sandbox.snapshot())
    assert not isinstance(snapshot, BaseException), snapshot
    assert sandbox.run("echo on", timeout=seconds(20)).output == "on\n"


ODD = {
    "fifo": "mkfifo odd/it",
    "socket": "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"odd/it\")'",
    "zero": "ln -s /dev/zero odd/it", "full": "ln -s /dev/full odd/it", "tty": "ln -s /dev/tty odd/it",
    "itself": "ln -s it odd/it", "process": "ln -s /proc/self/mem odd/it", "pipe": "ln -s /proc/kmsg odd/it",
    "sparse": "truncate -s 1T odd/it || truncate -s 32M odd/it",  # on disk a file has a limit
}


@pytest.mark.parametrize(
    "kind", [kind if kind in ("fifo", "sparse") else pytest.param(kind, marks=pytest.mark.ci) for kind in ODD]
)
def test_what_is_no_file_holds_nobody(yard: Yard, tmp_path: Path, kind: str) -> None:
    """x13, x14: where the host expects a file."""
    sandbox = yard.open()
    made = sandbox.run(f"cd /testbed && mkdir odd && {ODD[kind]}", timeout=seconds(20))
    assert made.exit_code == 0, made.output
    _use_everything(sandbox, "/testbed/odd/it", tmp_path)


def test_a_device_cannot_be_made(yard: Yard, who: str | None) -> None:
    """x14"""
    done = yard.open().run("mknod /tmp/zero c 1 5; mknod /dev/shm/disk b 8 0; ls -l /tmp/zero /dev/shm/disk", user=who)
    assert done.exit_code != 0 and "No such file" in done.output and "Operation not permitted" in done.output


def test_no_signal_ends_init(yard: Yard, who: str | None) -> None:
    """x22"""
    victim = subprocess.Popen(["sleep", yard.facts["victim"] + "22"])
    try:
        sandbox = yard.open()
        shell = sandbox.shell(user=who)
        shell.run("export KEPT=yes")
        yard.python(sandbox, "inside.hostile", "x22", user=who)  # init may end the sender for it
        within(30, lambda: sandbox.run(["bash", "-c", "kill -9 -1"], user=who, timeout=seconds(20)))
        assert within(30, lambda: shell.run("kill -9 -1; kill -9 $$", timeout=seconds(20))).exit_code == 137
        assert within(30, lambda: shell.run("echo $KEPT", timeout=seconds(20))).output == "yes\n"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def _namespaces(launcher: int) -> int:
    """How many there are below a launcher, as far as we may look."""
    found = set()
    for process in descendants(launcher):
        for kind in ("user", "mnt", "net", "uts", "ipc", "pid", "cgroup"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{process.pid}/ns/{kind}"))
    return len(found)


@pytest.mark.ci
def test_no_namespace_is_made_in_a_hundred_thousand_attempts(yard: Yard, who: str | None) -> None:
    """x23"""
    sandbox = yard.open()
    yard.settled()
    before = _namespaces(yard.launcher.pid)
    verdict = yard.rows(sandbox, "x23", user=who)["x23"]
    yard.settled()
    assert (verdict[0], _namespaces(yard.launcher.pid)) == ("OK", before), verdict


ANCESTORS = (
    "p=$$; while [ $p -gt 1 ]; do p=$(awk '/^PPid/ {print $2}' /proc/$p/status); kill -9 $p; done; echo survived"
)
AGAINST_THE_SHELL = {
    "kill -9 its parent": ("kill -9 $PPID; echo survived", "survived"),
    "stop its parent": ("kill -STOP $PPID; echo survived", "survived"),
    "kill itself": ("kill -9 $$", None),
    "stop itself": ("kill -STOP $$", None),
    "kill its ancestors": (ANCESTORS, "survived"),
    "exec": ("exec true", None),
    "close everything": ("for n in $(seq 3 255); do eval \"exec $n>&-\"; done; exec 0<&- 1>&- 2>&-", None),
    "become something else": ("exec sleep 1000", None),
}


@pytest.mark.parametrize("what", AGAINST_THE_SHELL)
def test_the_shell_goes_on_whatever_is_done_to_it(yard: Yard, who: str | None, what: str) -> None:
    """x24"""
    command, expected = AGAINST_THE_SHELL[what]
    shell = yard.open().shell(user=who, cwd="/tmp")
    shell.run("export KEPT=yes; f() { echo function; }")
    done = within(60, lambda: shell.run(command, timeout=seconds(1)))
    if expected is not None:
        assert expected in done.output
    after = within(60, lambda: shell.run("echo $KEPT; f; pwd", timeout=seconds(20)))
    assert (after.exit_code, after.output) == (0, "yes\nfunction\n/tmp\n")


# Run by the machine's own interpreter, by way of `#!/proc/self/exe`: whatever it can do to the file of itself.
OVERWRITE = r"""#!/proc/self/exe
import os
exe, did = "/proc/self/exe", []
held = os.open(exe, os.O_PATH)
for path in (exe, f"/proc/self/fd/{held}", os.readlink(exe)):
    for name, attempt in {
        "write": lambda: os.open(path, os.O_WRONLY), "truncate": lambda: os.truncate(path, 0),
        "chmod": lambda: os.chmod(path, 0o700), "times": lambda: os.utime(path, (1, 1)),
        "attribute": lambda: os.setxattr(path, "user.probe", b"x"), "unlink": lambda: os.unlink(path),
        "owner": lambda: os.chown(path, 0, 0),
    }.items():
        try:
            attempt()
        except OSError:
            continue
        did.append(f"{name} of {path}")
print("ran", did, flush=True)
os.set_inheritable(held, True)
os.execv("/usr/bin/python3", ["python3", "-c", f'''
import os, time
for _ in range(20):
    for name, attempt in (("write", lambda: os.open("/proc/self/fd/{held}", os.O_WRONLY)),
                          ("chmod", lambda: os.chmod("/proc/self/fd/{held}", 0o700))):
        try:
            attempt()
        except OSError:
            continue
        print("afterwards", name, flush=True)
        break
    time.sleep(0.01)
'''])
"""
SPIN = r"""
import os, time
did = set()
while not os.path.exists("/tmp/x25.stop"):
    for name in os.listdir("/proc"):
        if name.isdigit() and name != str(os.getpid()):
            try:
                target = os.readlink(f"/proc/{name}/exe")
                if os.path.exists(target):
                    continue
                held = os.open(f"/proc/{name}/exe", os.O_PATH)
            except OSError:
                continue
            try:
                os.open(f"/proc/self/fd/{held}", os.O_WRONLY)
                did.add(target)
            except OSError:
                pass
            os.close(held)
open("/tmp/x25.out", "w").write(f"opened {sorted(did)}")
"""


@pytest.mark.ci
def test_the_interpreter_that_enters_cannot_be_changed_from_inside(yard: Yard) -> None:
    """x25, CVE-2019-5736: bash is `#!/proc/self/exe`, which is the program of whoever enters.

    The machine's library of that interpreter is bound, so that it runs inside as it would for an attacker who brings
    one along.
    """
    program = Path(os.path.realpath(sys.executable))

    def state() -> tuple[str, int, int, int]:
        status = program.stat()
        return hashlib.sha256(program.read_bytes()).hexdigest(), status.st_mode, status.st_uid, status.st_mtime_ns

    before = state()
    prefix = Path(sys.base_prefix)
    binds = yard.spec.binds
    if not str(prefix).startswith("/usr"):
        binds = (*binds, Bind(str(prefix / "lib"), str(prefix / "lib")))
    sandbox = yard.open(binds=binds)
    sandbox.write_file("/tmp/spin.py", SPIN.encode())
    sandbox.run(["bash", "-c", "setsid python3 /tmp/spin.py >/dev/null 2>&1 &"])
    env = {"PYTHONHOME": str(prefix)}
    outputs = []
    for name in ("bash", "sh"):
        sandbox.write_file(f"/usr/local/bin/{name}", OVERWRITE.encode(), mode=0o755)
    for _ in range(5):
        outputs.append(sandbox.run("true", env=env, timeout=seconds(20)).output)
        outputs.append(sandbox.run(["sh", "-c", "true"], env=env, timeout=seconds(20)).output)
    within(60, lambda: sandbox.shell(env=env).run("true", timeout=seconds(2)))
    for name in ("bash", "sh"):
        sandbox.run(["/usr/bin/ln", "-sf", "/proc/self/exe", f"/usr/local/bin/{name}"])
        sandbox.run(["/usr/bin/timeout", "2", name, "-c", "true"], env=env, timeout=seconds(20))
    sandbox.run(["/usr/bin/touch", "/tmp/x25.stop"])
    wait = "while [ ! -s /tmp/x25.out ]; do sleep 0.05; done; cat /tmp/x25.out"
    spun = sandbox.run(["/usr/bin/bash", "-c", wait], timeout=seconds(20)).output
    after = state()
    if after != before:
        program.chmod(before[1] & 0o7777)
    assert after == before, outputs
    assert any("ran []" in output for output in outputs), outputs  # it did run, and could do nothing
    assert not any("afterwards" in output for output in outputs), outputs
    assert spun == "opened []"


@pytest.mark.ci
def test_no_descriptor_and_no_directory_leads_outside(yard: Yard, who: str | None) -> None:
    """x26, CVE-2024-21626"""
    sandbox = yard.open()
    assert yard.rows(sandbox, "x26", user=who)["x26"][0] == "OK"
    for number in range(32):
        code = f"pwd -P; cat ../../..{yard.facts['secret']} .{yard.facts['secret']}"
        for result in (
            sandbox.run(code, cwd=f"/proc/self/fd/{number}", user=who, timeout=seconds(20)),
            sandbox.shell(cwd=f"/proc/self/fd/{number}", user=who).run(code, timeout=seconds(20)),
            sandbox.shell(cwd=f"/proc/1/fd/{number}", user=who).run(code, timeout=seconds(20)),
        ):
            assert "unreachable" not in result.output and yard.facts["secret_text"] not in result.output


@pytest.mark.ci
@needs("root")
def test_a_secret_in_the_machines_etc_is_in_no_base(yard: Yard, tmp_path: Path) -> None:
    """x29: in /etc and /usr/local/share, also as pip.conf; the base `host` shows the machine's /usr."""
    pytest.importorskip("zstandard")
    from skyrl_minisandbox.images import host

    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    text = yard.facts["secret_text"] + "-x29"
    with traps.planted_files(text) as paths:
        binds, keep = host.make_root(root)
        spec: dict[str, Any] = {
            "layers": (root,), "keep": keep, "binds": tuple(Bind(source, target) for source, target in binds),
            "workdir": "/",
        }
        assert SandboxSpec(**spec)
        for changes in (spec, {}):
            sandbox = yard.open(**changes)
            for path in paths:
                assert text not in sandbox.run(["cat", path]).output, path
            # Of the machine's /usr what changed lately, of everything else all.
            found = sandbox.run(
                f"exec 2>/dev/null; find / -xdev -type f -print0 | xargs -0r grep -lF {text}; "
                f"find /usr -newermt '-10 minutes' -type f -print0 | xargs -0r grep -lF {text}; "
                "find / -name 'minisandbox-probe-*' -not -path '/proc/*'",
                timeout=seconds(60),
            )
            assert found.output == "", found.output
            sandbox.close()
