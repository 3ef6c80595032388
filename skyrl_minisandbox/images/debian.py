"""The base `debian`: a small root file system of Debian packages, made by mmdebstrap."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from skyrl_minisandbox.errors import BuildError, MachineError
from skyrl_minisandbox.images.layer import MTIME
from skyrl_minisandbox.images.locks import copy_stream, full_disk

PACKAGES = ("git", "ca-certificates", "patch", "procps", "libffi8", "libsqlite3-0", "libssl3", "libexpat1")
"""Beside mmdebstrap's minbase. The libraries are those that an interpreter from elsewhere most often needs; what is
still missing is taken along with it."""
SUITE = "bookworm"


def suite_and_mirror(apt: Path = Path("/etc/apt"), os_release: dict[str, str] | None = None) -> tuple[str, str]:
    """The suite and the mirror of the host's apt when the host is Debian; else (SUITE, "": mmdebstrap's default).

    Credentials in a mirror's URL are kept: it is handed to mmdebstrap, which reads it from a file of ours.
    """
    if os_release is None:
        import platform

        try:
            os_release = platform.freedesktop_os_release()
        except OSError:
            os_release = {}
    if os_release.get("ID") != "debian":
        return SUITE, ""
    suite = os_release.get("VERSION_CODENAME", SUITE)
    for source in [*sorted((apt / "sources.list.d").glob("*.sources")), apt / "sources.list"]:
        try:
            text = source.read_text()
        except OSError:
            continue
        for uri, suites in _entries(text):
            if suite in suites and uri.startswith(("http://", "https://")) and "security" not in uri:
                return suite, uri.rstrip("/")
    return suite, ""


def _entries(text: str) -> list[tuple[str, list[str]]]:
    """(URI, suites) pairs of a `.sources` (deb822) or `sources.list` file."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        fields = dict(line.split(":", 1) for line in lines if re.match(r"[A-Za-z-]+:", line))
        if "URIs" in fields and "deb" in fields.get("Types", "").split():
            suites = fields.get("Suites", "").split()
            found += [(uri, suites) for uri in fields["URIs"].split()]
    for match in re.finditer(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s", text, re.MULTILINE):
        found.append((match.group(1), [match.group(2)]))
    return found


def step_words(system_packages: Sequence[str]) -> list[str]:
    """What identifies the layer: the suite and every package asked for."""
    return ["debian", suite_and_mirror()[0], *PACKAGES, *sorted(system_packages)]


def make_root(sink: IO[bytes], system_packages: Sequence[str], aside: Path) -> None:
    """Write the root file system as a tar into `sink`.

    system_packages: further Debian packages. aside: a temporary directory on disk.

    Raises `MachineError` when mmdebstrap is missing or may not run, `BuildError` when it fails.
    """
    program = shutil.which("mmdebstrap")
    if program is None:
        raise MachineError(
            "base `debian` needs the program `mmdebstrap`, which is not on PATH",
            hint="apt-get install mmdebstrap, or use the base `host`",
        )
    suite, mirror = suite_and_mirror()
    mode = "root" if os.geteuid() == 0 else "unshare"
    if mode == "unshare" and not _has_subuids():
        raise MachineError(
            "base `debian` cannot be built by a plain user without a range of subordinate user ids",
            hint=f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {_user()}; "
            "or use the base `host`; or build the image as root into the shared store",
        )
    wanted = ",".join([*PACKAGES, *sorted(system_packages)])
    after = (
        'rm -f "$1/etc/resolv.conf" "$1/etc/hostname"; : > "$1/etc/resolv.conf"; echo sandbox > "$1/etc/hostname"; '
        'printf "127.0.0.1\\tlocalhost sandbox\\n::1\\tlocalhost\\n" > "$1/etc/hosts"; '
        'rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/* "$1"/usr/share/doc/* '
        '"$1"/usr/share/man/* "$1"/usr/share/info/* "$1"/usr/share/locale/*; '
        'echo "user:x:1000:1000:user:/home/user:/bin/bash" >> "$1/etc/passwd"; '
        'echo "user:x:1000:" >> "$1/etc/group"; mkdir -p "$1/home/user"; chown 1000:1000 "$1/home/user"; '
        'printf "[safe]\\n\\tdirectory = *\\n" > "$1/etc/gitconfig"'
    )
    if credentials := urlsplit(mirror).username:
        # apt's sources of the host may carry a password: it is for the build only, and in no layer.
        after += f"; sed -i 's#//[^/@]*@#//#' \"$1/etc/apt/sources.list\" # {len(credentials)}"
    command = [program, f"--mode={mode}", "--variant=minbase", "--quiet", f"--include={wanted}", "--format=tar"]
    command += ["--aptopt=APT::Install-Recommends false", f"--customize-hook={after}", suite, "-"]
    if mirror:
        command.append("-")  # the sources come on standard input, so that no credential stands in argv
    environment = dict(os.environ, TMPDIR=str(aside), SOURCE_DATE_EPOCH=str(MTIME), LC_ALL="C")
    log = aside / "mmdebstrap.log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            if mirror:
                process.stdin.write(f"deb {mirror} {suite} main\n".encode())
            process.stdin.close()
            copy_stream(process.stdout, sink)
        except BaseException:
            process.terminate()
            raise
        finally:
            process.stdout.close()
            process.wait()
    if process.returncode:
        text = log.read_text("utf-8", "replace")
        if "No space left on device" in text:
            raise full_disk(aside)
        lines = " / ".join(_without_password(line) for line in text.strip().splitlines()[-4:])
        raise BuildError(
            f"base `debian` ({suite}): mmdebstrap failed: {lines}",
            hint="can this machine reach its Debian mirror? try `apt-get update`, or use the base `host`",
        )


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//****@", text)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _has_subuids() -> bool:
    names = {_user(), str(os.geteuid())}
    for path in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return False
        if not any(line.split(":")[0] in names for line in lines):
            return False
    return shutil.which("newuidmap") is not None
