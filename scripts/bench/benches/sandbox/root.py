"""The root file system under every contender."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_PROGRAMS = ("bash", "true", "cat", "sleep", "env", "tar", "gzip", "head", "rm", "mkdir", "ls", "dd", "stat")


def small_root(path: Path) -> str:
    """A shell and a few programs of this machine with their libraries: 10 MB, made in a moment. Returns its name."""
    for name in ("bin", "usr/bin", "etc", "tmp", "root", "proc", "sys", "dev", "run", "var/tmp", "testbed", "opt"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for program in _PROGRAMS:
        found = shutil.which(program)
        if found is None:
            continue
        _copy(path, Path(f"/bin/{program}"), Path(found))
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, timeout=30, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", listed):
            _copy(path, Path(library), Path(library))
    (path / "bin/sh").symlink_to("bash")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (path / "etc/group").write_text("root:x:0:\n")
    os.chmod(path / "tmp", 0o1777)
    return "bash and a dozen programs of this machine"


def _copy(root: Path, target: Path, source: Path) -> None:
    place = root / str(target).lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        shutil.copy2(os.path.realpath(source), place)


def debian_root(path: Path) -> str:
    """The package's own base `debian`, unpacked and kept for the next run; needs root, mmdebstrap and a mirror."""
    from skyrl_minisandbox.images.debian import make_root

    release = path / "usr/lib/os-release"
    if not release.exists():
        made = path.with_name(path.name + ".new")
        tar = path.with_name(path.name + ".tar")
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as aside, open(tar, "wb") as file:
                make_root(file, (), Path(aside))
            subprocess.run(["tar", "-xf", tar, "-C", made], check=True, timeout=300)
        finally:
            tar.unlink(missing_ok=True)
        made.rename(path)
    name = next(line for line in release.read_text().splitlines() if line.startswith("PRETTY_NAME="))
    return f"{name.partition('=')[2].strip(chr(34))}, base `debian`"


def environment_archive(path: Path, size: int = 300 << 20) -> Path:
    """`size` bytes of the Python environment that this runs in, as the reference keeps its environments: a .tar.gz."""
    chosen, total = [], 0
    for directory, names, files in os.walk(sys.prefix):
        names.sort()
        for name in sorted(files):
            file = Path(directory, name)
            if total < size and not file.is_symlink():
                chosen.append(str(file.relative_to(sys.prefix)))
                total += file.stat().st_size
    listing = path.with_suffix(".list")
    listing.write_text("\0".join(chosen))
    subprocess.run(
        ["tar", "-C", sys.prefix, "--null", "-T", listing, "-I", "gzip -6", "-cf", path], check=True, timeout=600
    )
    return path
