"""What the guest's pid 1 runs: mounts, an ordinary user, cgroups, and then the runs that /checkout/plan.json names.

Standard library only. A run is a command as somebody (`root` or `user`) at a place in the cgroup hierarchy:

- `top`        the root of cgroup v2, as in a machine whose init makes no cgroups
- `session`    a scope that nothing was delegated to, with all controllers: what a login or a plain service has
- `delegated`  a cgroup that the user owns, as systemd makes it for `Delegate=yes`; its first process lies in it
- `leaf`       the same, with the process in a leaf of it, as for `Delegate=yes` with `DelegateSubgroup=`
- `none`       no cgroup file system

What a run leaves in the directory $OUT goes to the host as a tar file on the third disk, with `results.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pwd
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

CHECKOUT = Path("/checkout")
CGROUP = Path("/sys/fs/cgroup")
OUT = Path("/run/out")
USER = "guest"


def mount(kind: str, at: str | Path, options: str = "") -> None:
    Path(at).mkdir(parents=True, exist_ok=True)
    more = ["-o", options] if options else []
    subprocess.run(["mount", "-t", kind, *more, kind, str(at)], check=True)


def prepare() -> None:
    """What an init system would have done. /tmp stays on the disk, where overlayfs can have its upper."""
    mount("tmpfs", "/run", "mode=755")
    mount("tmpfs", "/dev/shm", "mode=1777")
    mount("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        with contextlib.suppress(FileExistsError):
            os.symlink(target, f"/dev/{name}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Something beside the loopback, as every machine has: that a sandbox does not see it is a promise.
    subprocess.run(["ip", "link", "add", "eth0", "type", "dummy"], check=False)
    subprocess.run(["ip", "link", "set", "eth0", "up"], check=False)
    subprocess.run(["modprobe", "overlay"], check=False)
    subprocess.run(["useradd", "-m", "-s", "/bin/bash", USER], check=True)
    Path("/etc/hosts").write_text("127.0.0.1 localhost guest\n::1 localhost\n")
    Path("/proc/sys/kernel/hostname").write_text("guest")
    OUT.mkdir()


def enable_all(cgroup: Path) -> None:
    names = (cgroup / "cgroup.controllers").read_text().split()
    (cgroup / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in names))


def make_place(place: str, name: str) -> Path | None:
    """The cgroup for a run of this name, or None where there is none to go to."""
    if place == "none":
        subprocess.run(["umount", "-l", str(CGROUP)], check=False)
        return None
    if not (CGROUP / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "-o", "nsdelegate", "cgroup2", str(CGROUP)], check=True)
    if place == "top":
        return CGROUP
    enable_all(CGROUP)
    slice_ = CGROUP / "user.slice"
    slice_.mkdir(exist_ok=True)
    enable_all(slice_)
    scope = slice_ / f"{name}.scope"
    scope.mkdir()
    if place == "session":
        return scope
    account = pwd.getpwnam(USER)
    leaf = scope / "main"
    if place == "leaf":
        leaf.mkdir()
    for cgroup in (scope, leaf):  # what systemd gives to the user of a delegated unit
        if cgroup.exists():
            os.chown(cgroup, account.pw_uid, account.pw_gid)
            for file in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
                os.chown(cgroup / file, account.pw_uid, account.pw_gid)
    return leaf if place == "leaf" else scope


def identity(who: str) -> tuple[dict[str, str], dict[str, object]]:
    """Environment, and what Popen needs to become that one."""
    account = pwd.getpwnam(who)
    environment = {
        "PATH": os.environ["PATH"] if who == "root" else "/usr/local/bin:/usr/bin:/bin",
        "HOME": account.pw_dir, "USER": who, "LOGNAME": who, "SHELL": "/bin/bash", "LANG": "C.UTF-8", "TERM": "dumb",
    }
    ids = {} if who == "root" else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return environment, ids


def own_checkout(who: str) -> Path:
    """A copy that this one owns, so that a run can write beside it."""
    target = Path(pwd.getpwnam(who).pw_dir) / "checkout"
    if not target.exists():
        shutil.copytree(CHECKOUT, target, symlinks=True)
        subprocess.run(["chown", "-R", f"{who}:", str(target)], check=True)
        target.chmod(0o755)
        if who == "root":
            Path("/root").chmod(0o755)  # tests make ordinary users who import what lies here
    return target


def run(step: dict[str, object]) -> dict[str, object]:
    """One run; its result for results.json."""
    name, who, place = str(step["name"]), str(step["who"]), str(step["place"])
    argv, limit = [str(part) for part in step["argv"]], float(str(step["limit"]))  # type: ignore[attr-defined]
    cgroup = make_place(place, name)
    environment, ids = identity(who)
    checkout = own_checkout(who)
    out = OUT / name
    out.mkdir()
    if ids:
        os.chown(out, int(str(ids["user"])), int(str(ids["group"])))
    environment |= {str(k): str(v) for k, v in dict(step["environment"]).items()}  # type: ignore[call-overload]
    environment |= {"OUT": str(out), "PYTHONPATH": f"{checkout}:/opt/packages", "PYTHONDONTWRITEBYTECODE": "1"}

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")

    print(f"--- {name}: {who}, cgroup {place}", flush=True)
    started = time.monotonic()
    # The shell joins the cgroup as root and only then becomes the user, as an init system does it.
    drop = [] if who == "root" else ["setpriv", "--reuid", who, "--regid", who, "--init-groups", "--"]
    process = subprocess.Popen(
        [*drop, *argv], cwd=checkout, env=environment, preexec_fn=enter, start_new_session=True
    )
    ended = True
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        ended = False
        process.send_signal(signal.SIGABRT)  # faulthandler's traceback
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    spent = time.monotonic() - started
    how = f"exit status {process.returncode}" if ended else "over its time"
    print(f"--- {name}: {how}, {spent:.0f} s", flush=True)
    return {"name": name, "who": who, "place": place, "exit": process.returncode, "ended": ended, "seconds": spent}


def main() -> None:
    prepare()
    plan = json.loads((CHECKOUT / "plan.json").read_text())
    print(f"--- guest is up: Linux {platform.release()}, Python {platform.python_version()}", flush=True)
    results = []
    for step in plan["runs"]:
        results.append(run(step))
        text = json.dumps({"kernel": platform.release(), "python": platform.python_version(), "runs": results})
        (OUT / "results.json").write_text(text)
        # After each run, so that what has ended is known whatever happens to the next.
        with open("/dev/vdc", "r+b") as disk, tarfile.open(fileobj=disk, mode="w") as archive:
            archive.add(OUT, arcname=".")


if __name__ == "__main__":
    main()
