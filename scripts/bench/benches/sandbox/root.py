"""The root file system under every contender."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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
    """An unpacked Debian (minbase), kept for the next run; needs root, mmdebstrap and its package mirror."""
    marker = path / "etc/os-release"
    if not marker.exists():
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(path.name + ".new")
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", "stable", str(made)],
            check=True, timeout=600, stdin=subprocess.DEVNULL, capture_output=True,
        )
        made.rename(path)
    name = next(line for line in marker.read_text().splitlines() if line.startswith("PRETTY_NAME="))
    return f"{name.partition('=')[2].strip(chr(34))}, minbase"


def environment_archive(path: Path) -> Path:
    """The Python environment that this runs in, as the reference keeps its environments: a .tar.gz (gzip -1 here; how
    it was packed does not tell in unpacking)."""
    import sys

    with open(path, "wb") as file:
        tar = subprocess.Popen(["tar", "-C", sys.prefix, "-c", "."], stdout=subprocess.PIPE)
        subprocess.run(["gzip", "-1"], stdin=tar.stdout, stdout=file, check=True, timeout=600)
        tar.wait()
    return path
