"""What `minisandbox doctor --sandbox` runs: it passes on a sound sandbox, and sees a weakness that is planted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Bind, SandboxSpec, client, features, self_check
from skyrl_minisandbox.sandbox.check import attempts, traps, trials
from skyrl_minisandbox.sandbox.self_check import Finding
from tests.support import OrdinaryUser, needs, seconds

pytestmark = needs("userns", "overlay")

INSIDE = {name for name, one in attempts.ATTEMPTS.items()}


def check(change: Callable[[SandboxSpec], SandboxSpec] = lambda spec: spec, *only: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in self_check.self_check(change=change, only=only)}


def test_a_sandbox_keeps_every_promise_on_this_machine() -> None:
    said: list[str] = []
    found = {finding.name: finding for finding in self_check.self_check(say=said.append)}
    assert set(found) == {*INSIDE, *trials.TRIALS, "private-proc", "user-inside"}
    assert not [finding for finding in found.values() if finding.broken]
    for finding in found.values():
        if finding.verdict != "OK":
            print(finding)
            assert finding.detail
    sure = [name for name in INSIDE if name not in ("shell-memory", "x32")]
    assert not [found[name] for name in sure if found[name].verdict != "OK"]
    assert len(said) == len(trials.TRIALS) + 2


def test_the_network_of_the_machine_is_seen() -> None:
    names = ("host-tcp", "host-abstract", "namespaces", "neighbours", "host-file", "loopback")
    found = check(lambda spec: dataclasses.replace(spec, network="host"), *names)
    assert {name for name in names if found[name].verdict == "BAD"} == set(names[:4])
    assert found["host-tcp"].detail == "connected" and found["host-tcp"].broken
    assert found["namespaces"].detail == "shared with the machine: net"


def test_directories_of_the_machine_are_seen() -> None:
    names = ("host-file", "host-socket", "host-shm", "host-tcp")
    directory = os.path.realpath(os.environ.get("TMPDIR") or "/tmp")
    binds = (Bind(directory, directory), Bind("/dev/shm", "/dev/shm"))
    found = check(lambda spec: dataclasses.replace(spec, binds=(*spec.binds, *binds)), *names)
    assert {name: found[name].verdict for name in names} == dict(zip(names, ("BAD", "BAD", "BAD", "OK"), strict=True))


def test_limits_that_are_not_kept_are_seen() -> None:
    def weaken(spec: SandboxSpec) -> SandboxSpec:
        return dataclasses.replace(spec, limits=dataclasses.replace(spec.limits, open_files=4096, core=1 << 20))

    found = check(weaken, "open-files", "core-size", "limit-output")
    assert (found["open-files"].verdict, found["open-files"].detail) == ("BAD", "the hard limit is 4096")
    assert (found["core-size"].verdict, found["limit-output"].verdict) == ("BAD", "OK")


@pytest.mark.ci
def test_an_upper_on_disk_is_weak_by_name_as_it_is_ended_later() -> None:
    found = check(lambda spec: dataclasses.replace(spec, on_disk=True), "limit-disk", "limit-inodes", "files")
    disk = found["limit-disk"]
    assert disk.verdict == "WEAK" and disk.accepted and not disk.broken, disk
    assert disk.detail == "more than the limit can be written; then the sandbox is ended"
    assert found["limit-inodes"].verdict in ("OK", "WEAK")  # ended while it was at it, or later
    assert found["files"].verdict == "OK"


def test_what_a_plain_namespace_lets_through_is_seen(tmp_path: Path) -> None:
    """The same attempts, where nothing but namespaces is: no filter, every capability, a free /proc."""
    bad = ["no-new-privs", "filter", "capabilities", "calls-mounting", "calls-namespaces", "interfaces"]
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"only": [*bad, "loopback"]}))
    command = [sys.executable, "-I", "-S", "-B", "-c", traps.BOOT, str(traps.PACKAGE), str(known)]
    weak = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc"]
    done = subprocess.run([*weak, *command], capture_output=True, text=True, timeout=seconds(60), check=False)
    found = {name: verdict for name, verdict, _ in map(json.loads, done.stdout.splitlines())}
    assert found == {**dict.fromkeys(bad, "BAD"), "loopback": "OK"}, done.stderr


def test_what_finds_nothing_on_the_bare_machine_either_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = traps.sprung

    def disarmed(known: dict[str, object]) -> dict[str, str]:
        known["text"] = "what is written nowhere"
        return real(known)

    monkeypatch.setattr(traps, "sprung", disarmed)
    found = check(lambda spec: spec, "host-file", "host-shm")
    assert found["host-file"].verdict == "not run" and "on the bare machine" in found["host-file"].detail
    assert found["host-shm"].verdict == "OK"


def test_an_attempt_that_ends_the_program_is_bad_and_what_follows_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    spec, _ = features.machine_spec(tmp_path / "layer", tmp_path / "scratch")
    launcher = client.LauncherClient()
    try:
        bench = trials.Bench(spec, launcher, "/usr/bin/false", {"only": ["host-file", "pty"]})
        with bench.open() as sandbox:
            found = self_check._attempt_as(bench, sandbox, None)
    finally:
        launcher.close()
    assert found["host-file"] == ("BAD", "the attempt ended the program that tried it: exit code 1")
    assert found["pty"] == ("not run", "the attempts ended before it, at `host-file`")


def test_a_user_inside_is_tried_or_is_said_not_to_be() -> None:
    found = check(lambda spec: spec, "filter")
    if os.geteuid() == 0:
        assert found["user-inside"].verdict == "OK"
    else:
        assert found["user-inside"].verdict == "not run" and "a single id" in found["user-inside"].detail


PROGRAM = """
import json, dataclasses, sys
from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.sandbox.self_check import self_check
try:
    print(json.dumps({f.name: f.verdict for f in self_check(allow_degraded=tuple(sys.argv[1:]))}))
except MiniSandboxError as error:
    print(error.exit_code, error.message)
"""


@pytest.mark.ci
@needs("rootless")
def test_a_proc_that_is_lost_is_weak_by_name_and_what_it_hides_is_not_run(user: OrdinaryUser) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no `setpriv`")

    def inside_a_pod(*lost: str) -> str:
        script = 'mount --bind /dev/null /proc/kcore 2>/dev/null || mount --bind /dev/null /proc/kmsg; exec "$@"'
        argv = ["unshare", "-m", "bash", "-c", script, "pod", "setpriv", f"--reuid={user.uid}", f"--regid={user.gid}",
                "--clear-groups", str(user.python), "-c", PROGRAM, *lost]
        done = subprocess.run(
            argv, env=user.environment(), capture_output=True, text=True, timeout=seconds(120), cwd=user.home,
            check=False,
        )
        return done.stdout + done.stderr

    assert inside_a_pod().startswith("3 a private /proc is forbidden here")
    found = json.loads(inside_a_pod("proc"))
    assert found["private-proc"] == "WEAK"
    for name in ("namespaces", "outside-id"):
        assert found[name] == "not run", name
    for name in ("host-file", "host-tcp", "filter", "capabilities", "calls-mounting", "close-leaves-nothing"):
        assert found[name] == "OK", name
