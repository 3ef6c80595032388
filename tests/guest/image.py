"""The disks of a guest: a Debian root with its kernel, cached by its recipe, and this checkout, made anew each time."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class GuestError(Exception):
    """Why there is no guest, with what to do about it."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A Debian release: the kernel package that it has, and the version of its Python."""

    name: str
    kernel: str
    python: str


KERNELS = {
    "6.1": Suite("bookworm", "linux-image-cloud-amd64", "3.11"),
    "6.12": Suite("trixie", "linux-image-cloud-amd64", "3.13"),
}
# Known, and why it is not run.
REFUSED = {
    "5.10": "bullseye's kernel is below the oldest that sandboxes support (5.12: mount_setattr)",
}

_PACKAGES = (
    "initramfs-tools", "python3", "git", "uidmap", "iproute2", "procps", "kmod", "strace",
    "golang-github-containers-common",  # containers' seccomp.json, which tests compare our filter with
)
# What tests/sandbox, tests/security and what they import of the package need beside the standard library.
_WHEELS = ("pytest>=8", "hypothesis>=6.100", "pydantic>=2.6", "zstandard>=0.22", "requests>=2.28", "rich>=13")

# pid 1 of the guest. All else comes with the checkout, so that the root stays as it is when that changes.
_INIT = """#!/bin/bash
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
for kind in proc sysfs devtmpfs; do
    case $kind in proc) at=/proc ;; sysfs) at=/sys ;; devtmpfs) at=/dev ;; esac
    mountpoint -q $at || mount -t $kind $kind $at
done
mkdir -p /checkout && mount -t ext4 -o ro /dev/vdb /checkout
PYTHONDONTWRITEBYTECODE=1 python3 /checkout/tests/guest/inside.py </dev/null
sync
echo o >/proc/sysrq-trigger
sleep 60
"""
_COPIED = ("skyrl_minisandbox", "tests", "configs", "scripts", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")


def suite_of(kernel: str) -> Suite:
    """The Debian release that has this kernel; raises GuestError naming what is known."""
    if kernel in KERNELS:
        return KERNELS[kernel]
    known = ", ".join(f"{version} ({suite.name})" for version, suite in KERNELS.items())
    reason = f": {REFUSED[kernel]}" if kernel in REFUSED else ""
    raise GuestError(f"no guest with kernel {kernel}{reason}\nhint: known are {known}")


def cache_directory() -> Path:
    """Where built roots stay."""
    kept = os.environ.get("MINISANDBOX_TEST_CACHE")
    if kept:
        return Path(kept) / "guests"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "skyrl-minisandbox-tests" / "guests"


def root_disk(suite: Suite) -> Path:
    """A directory with `root.img`, `vmlinuz` and `initrd.img`; built where the cache has none of this recipe."""
    recipe = json.dumps([dataclasses.astuple(suite), _PACKAGES, _WHEELS, _INIT])
    target = cache_directory() / f"{suite.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    _need_programs("mmdebstrap", "mke2fs")
    if os.geteuid() != 0:
        raise GuestError(
            f"there is no guest of {suite.name} in {target.parent} yet, and building one needs root\n"
            f"hint: run `scripts/guest {next(k for k, s in KERNELS.items() if s == suite)} true` once as root, with "
            "MINISANDBOX_TEST_CACHE set to a directory that you can read"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"{suite.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix="unfinished-", dir=target.parent) as scratch:
                made = _build(suite, Path(scratch))
                made.chmod(0o755)
                os.rename(made, target)
    return target


def _build(suite: Suite, scratch: Path) -> Path:
    root, made = scratch / "root", scratch / "made"
    made.mkdir()
    _say(f"building a guest of {suite.name} (once; a minute or two)")
    _run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join((suite.kernel, *_PACKAGES))}",
         "--aptopt=APT::Install-Recommends false", suite.name, str(root)], 1200,
    )
    _run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
         "--only-binary=:all:", f"--python-version={suite.python}", f"--target={root / 'opt/packages'}", *_WHEELS], 600,
    )
    (root / "guest-init").write_text(_INIT)
    (root / "guest-init").chmod(0o755)
    for name in ("vmlinuz", "initrd.img"):
        (found,) = (root / "boot").glob(f"{name}-*")
        shutil.copy(found, made / name)
    _disk(root, made / "root.img", spare=1500)
    return made


def checkout_disk(image: Path, plan: object, extra: Sequence[str] = ()) -> None:
    """This checkout as a disk, with `plan` for tests/guest/inside.py beside it."""
    _need_programs("mke2fs")
    with tempfile.TemporaryDirectory(prefix="minisandbox-tests-guest-") as directory:
        tree = Path(directory)
        ignore = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", "*.pyc")
        for name in (*_COPIED, *extra):
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=ignore, symlinks=True)
            elif source.exists():
                shutil.copy(source, tree / name)
        (tree / "plan.json").write_text(json.dumps(plan))
        _disk(tree, image, spare=16)


def _disk(tree: Path, image: Path, spare: int) -> None:
    """An ext4 file system with `tree` in it and `spare` MiB more; holes stay holes."""
    used = int(_run(["du", "-sm", "--apparent-size", str(tree)], 60).split()[0])
    size = used + used // 4 + spare
    argv = ["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-m", "0", "-d", str(tree), str(image), f"{size}M"]
    _run(argv, 300)


def _need_programs(*names: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing:
        hint = "apt-get install mmdebstrap e2fsprogs qemu-system-x86"
        raise GuestError(f"not installed: {', '.join(missing)}\nhint: {hint}")


def _run(argv: list[str], limit: float) -> str:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise GuestError(f"`{argv[0]}` took more than {limit:.0f} s") from None
    if done.returncode:
        raise GuestError(f"`{' '.join(argv)}` failed:\n{(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
