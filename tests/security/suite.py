"""The probes in a sandbox of ours: `python -m tests.security.suite` with the facts on standard input.

Runs as whoever calls it, makes its own layer, and prints one JSON object:

    {"machine": {...}, "root": {row: [verdict, detail]}, "user": {...} or null}

`root` and `user` are root-inside and a user-inside (uid 1000, no capabilities); null: that user does not exist where a
single id is mapped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests.security import traps
from tests.security.inside.common import ERR, VARIABLE, WEAK
from tests.security.inside.probes import order
from tests.support import base_binds, seconds

MIB = 1 << 20
# Below the thresholds of l01 to l03: 700 processes, 700 MiB, 400 MiB.
LIMITS = Limits(memory=512 * MIB, processes=200, disk=96 * MIB, output=4 * MIB)
SITE_PACKAGES = "/opt/env/lib/python3/site-packages"
INSIDE = Path(__file__).resolve().parent / "inside"
USER = "1000"

Verdicts = dict[str, tuple[str, str]]


def make_layer(path: Path) -> Path:
    """An empty root over which /usr is bound, with accounts, an environment and the rows in /opt/probes."""
    for name in ("usr/local/bin", "etc", "tmp", "root", "var/tmp", "testbed", "opt/env/bin", SITE_PACKAGES[1:]):
        (path / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (path / name).symlink_to(f"usr/{name}")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/tmp:/bin/bash\n")
    (path / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (path / "etc/shadow").write_text("root:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\n")
    (path / "etc/hostname").write_text("sandbox\n")
    shutil.copytree(INSIDE, path / "opt/probes/inside", ignore=shutil.ignore_patterns("__pycache__"))
    for directory, _, files in os.walk(path):
        os.chmod(directory, 0o755)
        for name in files:
            if not os.path.islink(os.path.join(directory, name)):
                os.chmod(os.path.join(directory, name), 0o644)
    os.chmod(path / "tmp", 0o1777)
    os.chmod(path / "var/tmp", 0o1777)
    return path


def make_spec(layer: Path, scratch: Path) -> SandboxSpec:
    keep = ("/usr/local",)
    return SandboxSpec((layer,), base_binds(), keep, workdir="/testbed", limits=LIMITS, scratch=scratch)


def put_repository(sandbox: Sandbox, place: Path) -> str:
    """A repository with a past and a future, put into /testbed the way images are built; "" or why not."""
    if shutil.which("git") is None:
        return "no git"
    try:
        from skyrl_minisandbox.images import steps
        from skyrl_minisandbox.images.recipe import GitCommit
    except ImportError as error:
        return f"the room that builds images cannot be imported: {error}"
    clone = place / "clone"
    clone.mkdir()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid", "-c", "init.defaultBranch=main"]
        command = ["git", *identity, "-C", str(clone), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds(60)).stdout.strip()

    git("init", "-q")
    for text in ("past", "present", "future"):
        (clone / "file.txt").write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", text)
        git("tag", text)
    commit = git("rev-parse", "present")
    with steps.fetch_commit(GitCommit(repo="owner/project", commit=commit, clone=str(clone)), place) as source:
        done = sandbox.run(steps.git_script(commit, "/testbed"), input=source, timeout=seconds(60))
    return "" if done.exit_code == 0 else done.output[-500:]


def run_rows(spec: SandboxSpec, launcher: LauncherClient, facts: dict[str, Any], user: str | None) -> Verdicts:
    """All rows in one Python process, child of a shell; then what the host judges."""
    known = {**facts, "outliver": facts["outliver"] + ("1" if user else "0")}
    found: Verdicts = {}
    groups: list[list[str]] = [order()]
    if not launcher.facts["tmpfs_upper"]:
        # On a disk upper the watcher ends the sandbox that l03 fills: that row has one of its own.
        groups = [[name for name in order() if name != "l03"], ["l03"]]
    for rows in groups:
        found.update(_run_group(spec, launcher, {**known, "rows": rows}, user))
    layer = spec.layers[0]
    assert isinstance(layer, Path)
    if traps.outlived(known["outliver"]):
        found["r01"] = ("BAD", "alive after close")
    pth = f"{SITE_PACKAGES}/{facts['pth']}"
    with Sandbox(spec, launcher) as fresh:
        seen = fresh.run(["test", "-e", pth]).exit_code == 0
    if seen or (layer / pth[1:]).exists():
        found["r02"] = ("BAD", "there afterwards")
    if os.path.lexists(facts["tmp_file"]):
        found["f04"] = ("BAD", "there on the host")
    names = order()
    return dict(sorted(found.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))


def _run_group(spec: SandboxSpec, launcher: LauncherClient, facts: dict[str, Any], user: str | None) -> Verdicts:
    from skyrl_minisandbox.errors import SandboxGone

    with tempfile.TemporaryDirectory(prefix="ms-security-tests-") as place, Sandbox(spec, launcher) as sandbox:
        repository = put_repository(sandbox, Path(place))
        env = {VARIABLE: json.dumps(facts), "PYTHONPATH": "/opt/probes", "PYTHONDONTWRITEBYTECODE": "1"}
        shell = sandbox.shell(user=user, env=env, cwd="/tmp")
        try:
            done = shell.run("python3 -m inside.probes", timeout=seconds(300))
        except SandboxGone as error:
            if facts["rows"] != ["l03"]:
                raise
            return {"l03": (WEAK, f"the sandbox was ended: {error}")}
    found: Verdicts = {}
    for line in done.output.splitlines():
        try:
            name, verdict, detail = json.loads(line)
        except ValueError:
            continue
        found[name] = (verdict, detail)
    if done.exit_code or done.timed_out:
        found["exit"] = (ERR, f"exit code {done.exit_code}: {done.output[-800:]}")
    if repository and "r03" in found:
        found["r03"] = (found["r03"][0], f"{found['r03'][1]} ({repository})")
    return found


def run_suite(facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, as the calling user. The token goes into our own environment before the launcher starts."""
    os.environ["MINISANDBOX_PROBE_TOKEN"] = facts["token"]
    try:
        with tempfile.TemporaryDirectory(prefix="ms-security-tests-", dir=_own_temporary()) as name:
            top = Path(name)
            top.chmod(0o755)
            spec = make_spec(make_layer(top / "layer"), top / "scratch")
            known = {**facts, "state_directory": str(top), "site_packages": SITE_PACKAGES}
            launcher = LauncherClient()
            try:
                single = bool(launcher.facts["single_id"])
                root = run_rows(spec, launcher, known, None)
                user = None if single else run_rows(spec, launcher, known, USER)
                machine = {
                    "kernel": platform.release(), "uid": os.geteuid(), "single_id": single,
                    "memory_cgroup": launcher.facts["memory_cgroup"], "tmpfs_upper": launcher.facts["tmpfs_upper"],
                    "limits": dataclasses.asdict(LIMITS),
                }
            finally:
                launcher.close()
    finally:
        del os.environ["MINISANDBOX_PROBE_TOKEN"]
    return {"machine": machine, "root": root, "user": user}


def _own_temporary() -> str | None:
    """As root below /tmp itself: what lies there everybody may enter."""
    return "/tmp" if os.geteuid() == 0 else None


if __name__ == "__main__":
    json.dump(run_suite(json.load(sys.stdin)), sys.stdout)
