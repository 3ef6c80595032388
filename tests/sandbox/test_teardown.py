"""Nothing survives `close`, nor the death of whoever owned it."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import Bind, Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient, shared, shutdown_launcher
from skyrl_minisandbox.sandbox.spare import READY_MADE
from tests.support import needs, seconds

OWNER = """
import sys, time
from pathlib import Path
from tests.sandbox.conftest import base_binds
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
sandbox = Sandbox(SandboxSpec((Path(sys.argv[1]),), base_binds(), scratch=Path(sys.argv[1]).parent / "scratch"))
sandbox.run("(setsid sleep 54321 &) ; sleep 54321 & true")
print(sandbox.pid, sandbox._launcher.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def gone(pids: list[int], limit: float | None = None) -> bool:
    deadline = time.monotonic() + (seconds(5) if limit is None else limit)
    while True:
        late = time.monotonic() > deadline  # before looking: a machine that stood still fails nobody
        if not any(alive(pid) for pid in pids):
            return True
        if late:
            return False
        time.sleep(0.01)


def is_init(pid: str) -> bool:
    """A launcher has other children too: who looks at uppers on disk."""
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "minisandbox\n"
    except OSError:
        return False


def settled(launcher: LauncherClient, sandboxes: int = 0) -> list[int]:
    """Wait until a launcher has the inits in store that it makes ahead; the pids of all its inits."""
    deadline = time.monotonic() + seconds(20)
    while time.monotonic() < deadline:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        inits = [int(pid) for pid in children if is_init(pid)]
        if len(inits) == sandboxes + READY_MADE:
            return inits
        time.sleep(0.03)
    raise AssertionError("the launcher does not come to rest")


def inside(init: int) -> list[int]:
    """Host pids of everything in the pid namespace of `init`."""
    namespace = os.readlink(f"/proc/{init}/ns/pid")
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    found.append(int(name))
            except OSError:
                continue
    return found


def test_close_ends_daemons_too(spec: SandboxSpec) -> None:
    sandbox = Sandbox(spec)
    sandbox.run("(setsid sleep 54321 &) ; nohup sleep 54321 >/dev/null 2>&1 & true")
    pids = inside(sandbox.pid) if os.geteuid() == 0 else [sandbox.pid]
    assert len(pids) >= 2 or os.geteuid() != 0
    sandbox.close()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_owner_takes_everything_along(layer: Path, sig: int) -> None:
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(layer)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert owner.stdout is not None
    init, launcher = map(int, owner.stdout.readline().split())
    pids = [*inside(init), launcher] if os.geteuid() == 0 else [init, launcher]
    owner.send_signal(sig)
    owner.wait()
    owner.stdout.close()
    assert gone(pids)


def test_a_killed_launcher_ends_its_sandboxes_and_the_next_one_starts_anew(spec: SandboxSpec) -> None:
    launcher = LauncherClient()
    sandbox = Sandbox(spec, launcher)
    pids = inside(sandbox.pid) if os.geteuid() == 0 else [sandbox.pid]
    os.kill(launcher.pid, signal.SIGKILL)
    assert gone(pids)
    with pytest.raises(SandboxGone):
        sandbox.run("true")
    sandbox.close()
    with Sandbox(spec) as other:
        assert other.run("echo on").output == "on\n"
    launcher.close()


def test_a_sandbox_outlives_the_thread_that_made_it(spec: SandboxSpec) -> None:
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(Sandbox(spec)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    with made[0] as sandbox:
        assert sandbox.run("echo on").output == "on\n"


def test_a_dropped_sandbox_ends(spec: SandboxSpec) -> None:
    sandbox = Sandbox(spec)
    pid = sandbox.pid
    del sandbox
    assert gone([pid])


@needs("root", "cgroup")
def test_cgroups_are_gone_after_close_and_swept_after_a_crash(spec: SandboxSpec) -> None:
    def ours(launcher: LauncherClient) -> list[str]:
        return [str(p) for p in Path("/sys/fs/cgroup").rglob(f"minisandbox-{launcher.pid}-*")]

    first = LauncherClient()
    sandbox = Sandbox(spec, first)
    processes = [p for d in ours(first) for p in Path(d).glob("*/cgroup.procs")]
    its = [p.parent for p in processes if str(sandbox.pid) in p.read_text().split()]
    sandbox.close()
    assert its and not any(directory.exists() for directory in its)
    first.close()
    assert ours(first) == []
    second = LauncherClient()
    sandbox = Sandbox(spec, second)
    inits = [sandbox.pid, *settled(second, 1)]
    os.kill(second.pid, signal.SIGKILL)
    assert gone(inits)
    second.close()
    assert ours(second) != []
    third = LauncherClient()
    assert ours(second) == []
    third.close()


def test_many_sandboxes_leave_no_descriptor_and_no_mount(spec: SandboxSpec) -> None:
    launcher = LauncherClient()
    Sandbox(spec, launcher).close()

    def held() -> tuple[int, int, int]:
        mine = len(os.listdir("/proc/self/fd"))
        theirs = len(os.listdir(f"/proc/{launcher.pid}/fd")) if os.geteuid() == 0 else 0
        mounts = len(Path(f"/proc/{launcher.pid}/mountinfo").read_text().splitlines()) if os.geteuid() == 0 else 0
        return mine, theirs, mounts

    settled(launcher)
    gc.collect()  # what earlier tests left to the collector
    before = held()
    for _ in range(30):
        with Sandbox(spec, launcher) as sandbox:
            sandbox.shell().run("true")
    settled(launcher)
    assert held() == before
    launcher.close()


@needs("root")
def test_a_sandbox_that_cannot_be_made_leaves_no_descriptor(spec: SandboxSpec) -> None:
    launcher = LauncherClient()
    Sandbox(spec, launcher).close()
    settled(launcher)
    before = len(os.listdir(f"/proc/{launcher.pid}/fd"))
    for _ in range(5):
        with pytest.raises(SandboxError, match="bind /nowhere"):
            Sandbox(dataclasses.replace(spec, binds=(Bind("/nowhere", "/opt"),)), launcher)
    settled(launcher)
    assert len(os.listdir(f"/proc/{launcher.pid}/fd")) == before
    launcher.close()


def test_a_layer_made_anew_in_the_same_place_is_seen(spec: SandboxSpec, tmp_path: Path) -> None:
    """A damaged entry of a cache is removed and unpacked again while the launcher lives on."""
    top = tmp_path / "layer"
    for text in ("old", "new"):
        top.mkdir(mode=0o755)
        (top / "mark").write_text(text)
        with Sandbox(dataclasses.replace(spec, layers=(*spec.layers, top))) as sandbox:
            assert sandbox.run("cat /mark; pwd").output == f"{text}/testbed\n"
        shutil.rmtree(top)


def test_everybody_who_ends_a_sandbox_is_answered(spec: SandboxSpec) -> None:
    sandbox = Sandbox(spec)
    sandbox.run("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done")
    threads = [
        threading.Thread(target=lambda: sandbox._launcher.ask("destroy", box=sandbox._box.number), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    sandbox.close()


def test_a_sandbox_that_came_too_late_ends(spec: SandboxSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = LauncherClient()
    monkeypatch.setattr("skyrl_minisandbox.sandbox.client.ANSWER_TIMEOUT", 0.2)
    os.kill(launcher.pid, signal.SIGSTOP)
    with pytest.raises(SandboxError, match="did not answer `create`"):
        Sandbox(spec, launcher)
    os.kill(launcher.pid, signal.SIGCONT)
    monkeypatch.undo()
    with Sandbox(spec, launcher) as sandbox:  # answered after the late one
        assert sandbox.pid in settled(launcher, 1)
    launcher.close()


def test_a_launcher_that_does_not_answer_is_asked_for_no_more_sandboxes(
    spec: SandboxSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown_launcher()
    silent = shared()
    living = Sandbox(spec)
    monkeypatch.setattr("skyrl_minisandbox.sandbox.client.ANSWER_TIMEOUT", 0.2)
    os.kill(silent.pid, signal.SIGSTOP)
    with pytest.raises(SandboxError, match="did not answer `create`"):
        Sandbox(spec)
    monkeypatch.undo()
    with Sandbox(spec) as sandbox:
        assert sandbox.run("echo made").output == "made\n"
        assert shared().pid != silent.pid
    assert living.run("echo lives").output == "lives\n"
    os.kill(silent.pid, signal.SIGCONT)
    living.close()
    shutdown_launcher()
    assert not silent.alive, "the one that was put aside ends with the other"


def test_the_launcher_gets_nothing_of_our_environment_but_where_its_library_lies(
    spec: SandboxSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISANDBOX_TOKEN", "secret-token")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nonexistent/lib")
    launcher = LauncherClient()
    with Sandbox(spec, launcher) as sandbox:
        environ = Path(f"/proc/{launcher.pid}/environ").read_bytes().split(b"\0") if os.geteuid() == 0 else []
        assert environ in ([b"LD_LIBRARY_PATH=/nonexistent/lib", b""], [])
        assert "nonexistent" not in sandbox.run("env").output
    launcher.close()
