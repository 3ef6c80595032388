"""The base `host`: this machine's `/usr`, read-only, under an `/etc` and everything else made by us.

What is visible inside is decided by lists of what may be seen, never of what may not. `/opt`, `/home`,
`/usr/local` and every file of `/etc` that is not named here stay outside, whatever their permissions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from skyrl_minisandbox.errors import MachineError
from skyrl_minisandbox.images.image import Image

ETC_FILES = (
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "ssl/certs",
    "ssl/openssl.cnf",
    "ca-certificates.conf",
    "pki/tls/certs",
    "pki/tls/cert.pem",
    "pki/tls/openssl.cnf",
    "pki/ca-trust/extracted",
    "crypto-policies/back-ends",
    "alternatives",
    "services",
    "protocols",
    "mime.types",
    "localtime",
    "timezone",
)
"""Of the host's /etc, and only what everybody may read there."""
ETC_OURS = {
    "passwd": (
        "root:x:0:0:root:/root:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
        "user:x:1000:1000:user:/home/user:/bin/bash\n"
    ),
    "group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\nuser:x:1000:\n",
    "nsswitch.conf": (
        "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n"
    ),
    "hosts": "127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "resolv.conf": "",
    "hostname": "sandbox\n",
    # What a layer holds belongs to other ids than the one that runs git, depending on who mounts it.
    "gitconfig": "[safe]\n\tdirectory = *\n",
    "shells": "/bin/sh\n/bin/bash\n",
}
EMPTY_DIRECTORIES = {
    "proc": 0o555,
    "dev": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "run": 0o755,
    "var": 0o755,
    "var/tmp": 0o1777,
    "var/lib": 0o755,
    "var/cache": 0o755,
    "var/log": 0o755,
    "root": 0o700,
    "home": 0o755,
    "home/user": 0o755,
    "opt": 0o755,
    "mnt": 0o755,
    "srv": 0o755,
    "usr": 0o755,
    "usr/local": 0o755,
    **{f"usr/local/{name}": 0o755 for name in ("bin", "etc", "include", "lib", "sbin", "share", "src")},
}
KEEP = ("/usr/local",)
"""Paths below /usr that stay ours."""
_PACKAGES = ("usr/lib/python3/dist-packages", "usr/lib/python3*/site-packages", "usr/lib64/python3*/site-packages")
"""What the machine's package manager installed for its own Python: it may hold a later release of the very project that
a task is about, so it is covered too."""
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def make_root(target: Path, host: Path = Path("/")) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Fill the empty directory `target` with the root file system of base `host`; returns its binds, and the paths
    that stay ours below them.

    host: where the host's tree is read from; only tests name another.
    """
    binds = [(str(host / "usr"), "/usr")]
    for name, mode in EMPTY_DIRECTORIES.items():
        (target / name).mkdir(exist_ok=True)
        (target / name).chmod(mode)
    for name in _MERGED:
        found = host / name
        if found.is_symlink():
            (target / name).symlink_to(_inside_usr(os.readlink(found)))
        elif found.is_dir():  # a host whose /usr is not merged
            (target / name).mkdir()
            binds.append((str(found), f"/{name}"))
    etc = target / "etc"
    etc.mkdir()
    for name, text in ETC_OURS.items():
        (etc / name).write_text(text)
        (etc / name).chmod(0o644)
    for name in ETC_FILES:
        _copy_public(host / "etc" / name, etc / name)
    for directory, _, _ in os.walk(etc):
        os.chmod(directory, 0o755)
    found_packages = sorted({path for pattern in _PACKAGES for path in host.glob(pattern) if path.is_dir()})
    packages = [str(path.relative_to(host)) for path in found_packages if not path.is_symlink()]
    for name in packages:
        (target / name).mkdir(parents=True)
    for directory, _, _ in os.walk(target / "usr"):
        os.chmod(directory, 0o755)
    return tuple(binds), (*KEEP, *(f"/{name}" for name in packages))


def _inside_usr(link: str) -> str:
    relative = link.lstrip("/")
    return relative if relative.startswith("usr/") else f"usr/{relative}"


def _copy_public(source: Path, target: Path) -> None:
    """Copy what everybody may read; links as links when they stay within /etc or /usr, else their content."""
    try:
        found = source.lstat()
    except OSError:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if stat.S_ISLNK(found.st_mode):
        link = os.readlink(source)
        full = os.path.normpath(os.path.join(source.parent, link))
        if full.startswith(("/usr/", "/etc/")) and not full.startswith("/usr/local/"):
            target.symlink_to(link)
    elif stat.S_ISDIR(found.st_mode) and found.st_mode & 0o005 == 0o005:
        target.mkdir(exist_ok=True)
        for name in sorted(os.listdir(source)):
            _copy_public(source / name, target / name)
    elif stat.S_ISREG(found.st_mode) and found.st_mode & 0o004:
        shutil.copyfile(source, target)
        target.chmod(0o755 if found.st_mode & 0o111 else 0o644)


@functools.cache
def _facts() -> tuple[tuple[str, str], ...]:
    return (
        ("kind", "host"),
        ("machine", platform.machine()),
        ("os", _os_release()),
        ("glibc", _glibc()),
        ("packages", _package_list_digest()),
    )


def facts() -> dict[str, str]:
    """What this machine's `/usr` is: architecture, os-release, glibc and a digest of the package list."""
    return dict(_facts())


def facts_digest(known: Mapping[str, str]) -> str:
    """Hex digest of base facts, to look images up by."""
    return hashlib.sha256(json.dumps(dict(known), sort_keys=True).encode()).hexdigest()


def check_same_host(image: Image) -> None:
    """Raise `MachineError` when `image` has base `host` and was built over another `/usr` than this node's."""
    if image.base.get("kind") != "host":
        return
    here = facts()
    for key, word in (
        ("machine", "architecture"),
        ("os", "operating system"),
        ("glibc", "glibc"),
        ("packages", "list of installed packages"),
    ):
        built, ours = image.base.get(key, ""), here[key]
        if built != ours:
            raise MachineError(
                f"image {image.name or image.digest[:19]} has the base `host` and was built over another /usr: "
                f"its {word} is {built[:40]}, that of node {platform.node()} is {ours[:40]}",
                hint="build it again on this node (minisandbox image build), or use base `debian` for several nodes",
            )


def _os_release() -> str:
    try:
        known = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return f"{known.get('ID', '?')} {known.get('VERSION_ID', '')}".strip()


def _glibc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return "none"  # musl


def _package_list_digest() -> str:
    """SHA-256 over names and versions of what the package manager has installed."""
    status = Path("/var/lib/dpkg/status")
    lines: list[str] = []
    if status.exists():
        for paragraph in status.read_text("utf-8", "replace").split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
            if fields.get("Status", "").endswith(" installed"):
                lines.append(f"{fields.get('Package')} {fields.get('Architecture')} {fields.get('Version')}")
    elif Path("/lib/apk/db/installed").exists():
        text = Path("/lib/apk/db/installed").read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if line[:2] in ("P:", "V:")]
    elif shutil.which("rpm"):
        done = subprocess.run(["rpm", "-qa"], capture_output=True, text=True, timeout=120, check=False)
        lines = done.stdout.splitlines()
    else:  # no package manager that we know: what lies in the library directories stands for it
        for directory in ("/usr/bin", "/usr/lib", "/usr/lib64"):
            if os.path.isdir(directory):
                lines += os.listdir(directory)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
