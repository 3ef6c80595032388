"""A protection that is missing is an error, unless it is named as one that may be lost."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec
from tests.sandbox.conftest import make_layer
from tests.support import OrdinaryUser, needs, seconds

PROGRAM = """
import sys
from pathlib import Path
from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.sandbox import Bind, Sandbox, SandboxSpec
layer, scratch, *lost = sys.argv[1:]
spec = SandboxSpec((Path(layer),), (Bind("/usr", "/usr"),), allow_degraded=tuple(lost), scratch=Path(scratch))
try:
    with Sandbox(spec) as sandbox:
        print(sandbox.lost, sandbox.run("echo alive; ls /proc | wc -l").output.split())
        print(sandbox.run("sleep 100 & sleep 100", timeout=0.3).timed_out, sandbox.shell().run("echo on").output)
        sandbox.freeze()
except MiniSandboxError as error:
    print(type(error).__name__, error.render())
"""


@needs("rootless", "overlay")
def test_a_masked_proc_is_refused_with_the_way_out_and_may_be_lost_by_name(user: OrdinaryUser) -> None:
    layer = make_layer(user.home / "layer")
    shutil.chown(layer, user.uid, user.gid)
    for path in layer.rglob("*"):
        if not path.is_symlink():
            shutil.chown(path, user.uid, user.gid)

    scratch = user.home / "scratch"  # Linux 6.1 cannot hold a plain user's upper on tmpfs
    scratch.mkdir()
    shutil.chown(scratch, user.uid, user.gid)

    def inside_a_pod(*lost: str) -> str:
        script = 'mount --bind /dev/null /proc/kcore 2>/dev/null || mount --bind /dev/null /proc/kmsg; exec "$@"'
        argv = ["unshare", "-m", "bash", "-c", script, "pod", "setpriv", f"--reuid={user.uid}", f"--regid={user.gid}",
                "--clear-groups", str(user.python), "-c", PROGRAM, str(layer),
                str(scratch), *lost]
        done = subprocess.run(argv, env=user.environment(), capture_output=True, text=True, timeout=seconds(60),
                              cwd=user.home)
        return done.stdout + done.stderr

    refused = inside_a_pod()
    assert "MachineError a private /proc is forbidden here" in refused
    assert "procMount: Unmasked" in refused and "sandbox.allow_degraded=[proc]" in refused
    assert inside_a_pod("proc") == "('proc',) ['alive', '0']\nTrue on\n\n"


def test_an_unknown_protection_is_refused(spec: SandboxSpec) -> None:
    with pytest.raises(SandboxError, match="`seccomp` is no protection that may be lost; known: proc"):
        Sandbox(dataclasses.replace(spec, allow_degraded=("seccomp",)))


def test_what_is_not_missing_is_not_lost(spec: SandboxSpec) -> None:
    with Sandbox(dataclasses.replace(spec, allow_degraded=("proc",))) as sandbox:
        assert sandbox.lost == ()
        assert sandbox.run("ls /proc/self/exe").exit_code == 0
        assert Path("/proc", str(sandbox.pid)).exists()
