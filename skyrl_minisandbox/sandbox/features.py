"""What this machine can do for a sandbox: tried, not guessed. The list that `minisandbox doctor` prints.

A check is named for the pattern it looks for, never for the cure.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import tempfile
from pathlib import Path

from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.sandbox import client
from skyrl_minisandbox.sandbox.sandbox import Sandbox
from skyrl_minisandbox.sandbox.seccomp import AUDIT_ARCH
from skyrl_minisandbox.sandbox.spec import Bind, SandboxSpec

_OLDEST = (5, 12)  # mount_setattr; overlayfs for plain users since 5.11


@dataclasses.dataclass(frozen=True)
class Feature:
    """One check.

    ok: it works. needed: nothing runs without it. what: what was found. cost: what is lost without it.
    fix: what to do, "" when nothing is to be done.
    """

    name: str
    ok: bool
    needed: bool
    what: str
    cost: str = ""
    fix: str = ""


def features(directory: str | None = None) -> list[Feature]:
    """Run every check; a launcher of its own is started and ended. A check that cannot be run any more is left out.

    directory: where a sandbox may have an upper on disk; the usual one for temporary files by default.
    """
    if sys.platform != "linux":
        return [Feature("linux", False, True, f"this is {sys.platform}", "sandboxes are Linux namespaces", "use Linux")]
    found = [_kernel(), _architecture()]
    try:
        launcher = client.LauncherClient()
    except MiniSandboxError as error:
        return [*found, Feature("user-namespaces", False, True, error.message, "no sandbox can be made", error.hint)]
    try:
        found.append(Feature("user-namespaces", True, True, "they can be made"))
        found += _facts(launcher)
        found.append(_sandbox(launcher, directory))
    finally:
        launcher.close()
    return found


def _kernel() -> Feature:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    ok = numbers >= _OLDEST
    return Feature(
        "kernel", ok, True, f"Linux {release}", "`mount_setattr` is missing, without which no root is made",
        "" if ok else f"Linux {_OLDEST[0]}.{_OLDEST[1]} or newer",
    )


def _architecture() -> Feature:
    machine = platform.machine()
    ok = machine in AUDIT_ARCH
    return Feature(
        "architecture", ok, True, machine,
        "there is no seccomp filter for it", "" if ok else f"one of {', '.join(sorted(AUDIT_ARCH))}",
    )


def _facts(launcher: client.LauncherClient) -> list[Feature]:
    facts = launcher.facts
    found = [
        Feature(
            "id-range", not facts["single_id"], False,
            "root only: a single id is mapped" if facts["single_id"] else "65,536 users and groups are mapped",
            "other users than root do not exist inside; owners are squashed to root",
            "" if not facts["single_id"] else "run as root, where that is possible",
        ),
        Feature(
            "upper-on-tmpfs", facts["tmpfs_upper"], False,
            "works" if facts["tmpfs_upper"] else "this kernel fails to remove lower directories over it",
            "what a sandbox writes goes to disk below `images.cache`, which has no quota: it is looked at every few "
            "seconds, and a sandbox beyond its limit on bytes or files is ended, after the machine has lost more",
            "" if facts["tmpfs_upper"] else "a newer kernel (6.6 or later), or run as root",
        ),
    ]
    by = {"memory-limit": "memory_cgroup", "process-limit": "pids_cgroup", "cpu-weight": "cpu_cgroup"}
    missing = [name for name, fact in by.items() if not facts.get(fact)]
    reason = facts["cgroup"] or "its controllers are not all there"
    found.append(Feature(
        "cgroup", not missing, False, reason if missing else "memory, processes and cpu are limited by it",
        f"weaker below: {', '.join(missing)}", _cgroup_fix() if missing else "",
    ))
    return found + [Feature(name, False, False, "without a cgroup", _COSTS[name]) for name in missing]


_COSTS = {
    "memory-limit": "memory is limited for each process, not for the sandbox, and running out of it is not told as "
    "`oom_killed`; what is written to memory (the root, /dev/shm) has its own limits beside that",
    "process-limit": "processes are limited by RLIMIT_NPROC, for each user inside on its own",
    "cpu-weight": "a sandbox gets a share of the processors for each of its processes, however many they are",
}


def _cgroup_fix() -> str:
    """What gives a cgroup, by the version that this machine has and by who asks."""
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):  # of v2 alone; hybrid machines limit by v1
        if not os.path.isdir("/sys/fs/cgroup/memory"):
            return "mount the cgroup file system at /sys/fs/cgroup, writable; in a pod run it privileged"
        if os.geteuid() == 0:
            return "make /sys/fs/cgroup writable; in a pod run it privileged"
        return "run as root, or boot with cgroup v2 (`systemd.unified_cgroup_hierarchy=1`) and use `Delegate=yes`"
    if os.geteuid() == 0:
        return "for a systemd service `Delegate=yes` and `DelegateSubgroup=own`; in a pod a writable /sys/fs/cgroup"
    return (
        "run below `systemd-run --user --scope -p Delegate=yes COMMAND`; for a service `Delegate=yes` and "
        "`DelegateSubgroup=own`; for the cpu controller also `Delegate=cpu memory pids` on user@.service"
    )


def machine_spec(layer: Path, scratch: Path) -> tuple[SandboxSpec, tuple[str, ...]]:
    """A sandbox over the machine's /usr, and the Python interpreters that may run in it, the best first.

    layer: an empty directory, filled with what else a root file system must have. The running interpreter's prefix is
    bound at its own path, where it is not below /usr. scratch: for an upper on disk, where that is needed.
    """
    for name in ("usr", "etc", "root", "var", "opt"):
        (layer / name).mkdir(mode=0o755)
    (layer / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/tmp:/bin/bash\n")
    (layer / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    binds = [Bind("/usr", "/usr")]
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (layer / name).symlink_to(f"usr/{name}")
        elif os.path.isdir(f"/{name}"):
            binds.append(Bind(f"/{name}", f"/{name}"))
    python, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    if python.startswith(f"{prefix}/") and not f"{prefix}/".startswith("/usr/"):
        binds.append(Bind(prefix, prefix))
    for path in [*(layer / "etc").iterdir(), layer, *(each for each in layer.iterdir() if not each.is_symlink())]:
        path.chmod(0o755)  # whatever the umask is: a user inside reads them too
    spec = SandboxSpec((layer,), tuple(binds), env=client._launcher_env(), scratch=scratch)
    return spec, (python, "/usr/bin/python3", "/usr/local/bin/python3")


def _sandbox(launcher: client.LauncherClient, place: str | None) -> Feature:
    """Make a sandbox over an empty layer with the machine's /usr, and run something in it."""
    with tempfile.TemporaryDirectory(prefix="minisandbox-doctor-", dir=place) as directory:
        layer = Path(directory, "layer")
        layer.mkdir()
        spec, _ = machine_spec(layer, Path(directory, "scratch"))
        try:
            with Sandbox(spec, launcher) as sandbox:
                result = sandbox.run(["sh", "-c", "echo alive"], timeout=30)
        except MiniSandboxError as error:
            return Feature("sandbox", False, True, error.message, "nothing can run here", error.hint)
    works = result.stdout == b"alive\n"
    return Feature(
        "sandbox", works, True, "made, verified from inside, and gone" if works else result.output.strip(),
        "nothing can run here", "" if works else "run `minisandbox doctor` as root to compare",
    )
