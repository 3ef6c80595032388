"""What happens inside a build's sandbox: the environment at /opt/env, and the repository as one commit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from skyrl_minisandbox.errors import InputError, MachineError
from skyrl_minisandbox.images.access import PRIVATE
from skyrl_minisandbox.images.layer import MTIME
from skyrl_minisandbox.images.recipe import GitCommit, Sdist
from skyrl_minisandbox.images.sources import normalise

ENV = "/opt/env"
PIP_VERSIONS = {"3.6": "21.3.1", "3.7": "24.0", "3.8": "25.0.1", "3.9": "25.3"}
"""The last pip for a Python that newer ones do not support."""
PIP_VERSION = "25.3"
PIP_WHEEL_DIRECTORY = f"{PRIVATE}/pip"
_IGNORED = "*.egg-info/\n__pycache__/\n*.pyc\n.pytest_cache/\n"
"""What installing and testing leave in a tree, and no patch is about."""


def pip_version(python: str) -> str:
    """The pip for a Python `3.11`."""
    return PIP_VERSIONS.get(python, PIP_VERSION)


def environment_script(python: str, version: str, pip_wheel: str, groups: Sequence[Sequence[str]]) -> str:
    """A shell script that makes /opt/env: a venv without pip (Debian's Python has no ensurepip), pip from its wheel,
    then each group of exact pins, then `.pyc` files that do not depend on time stamps.

    python: the interpreter inside. version: `3.11`. pip_wheel: file name below PIP_WHEEL_DIRECTORY.

    The pip of 3.6 would run a `setup.py` in the environment, which has no setuptools yet; newer ones build it in an
    environment of its own, as it is told to here, and can do that from within their wheel.
    """
    wheel = f"{PIP_WHEEL_DIRECTORY}/{pip_wheel}"
    lines = ["set -e", f"{python} -m venv --without-pip {ENV}"]
    pip, new = f"PYTHONPATH={wheel} {ENV}/bin/python -m pip install --no-deps", wheel
    for number, pins in enumerate(_together(groups)):
        requirements = f"{PRIVATE}/requirements{number}.txt"
        lines.append(f"printf '%s\\n' {' '.join(map(shlex.quote, pins))} > {requirements}")
        if version == "3.6" and new:
            lines.append(f"{pip} {new}")
            pip, new = f"{ENV}/bin/python -m pip install --no-deps --use-pep517", ""
        lines.append(f"{pip} {new} -r {requirements}")
        if new:
            pip, new = f"{ENV}/bin/python -m pip install --no-deps", ""
    lines += compile_lines(f"{ENV}/bin/python", version, f"{ENV}/lib")
    return "\n".join(lines) + "\n"


def _together(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The groups as one, so that pip starts once, unless two of them pin the same project: then the later one wins.

    pip itself comes from its wheel, which has the version that a pin of it names.
    """

    def project(pin: str) -> str:
        return normalise(re.split(r"[\s\[=<>!~;@]", pin.strip(), maxsplit=1)[0])

    kept = [[pin for pin in dict.fromkeys(group) if project(pin) != "pip"] for group in groups]
    together = list(dict.fromkeys(pin for group in kept for pin in group))
    if len({project(pin) for pin in together}) == len(together):
        return [together]
    return kept


def compile_lines(python: str, version: str, directory: str) -> list[str]:
    """Shell lines that compile a tree. Files of an old Python in it that do not parse are not an error.

    3.6 knows time stamps only, so there the sources get the one that they will have in the layer.
    One process and a fixed hash seed: what marshal writes depends on what the process compiled before.
    """
    compile_all = f"PYTHONHASHSEED=0 {python} -m compileall -q -f"
    if version == "3.6":
        return [
            f"find {directory} -name '*.py' -exec touch -d @{MTIME} {{}} +",
            f"{compile_all} {directory} > /dev/null 2>&1 || true",
        ]
    return [f"{compile_all} --invalidation-mode unchecked-hash {directory} > /dev/null 2>&1 || true"]


def python_script(version: str) -> str:
    """Compile the interpreter's own library, and see that it works: pip needs these modules."""
    home = f"/opt/python/{version}"
    python = f"{home}/bin/python{version}"
    lines = ["set -e", f"{python} -c 'import ssl, zlib, ctypes, hashlib, venv'"]
    return "\n".join([*lines, *compile_lines(python, version, f"{home}/lib/python{version}")]) + "\n"


def sdist_script(archive: str, workdir: str) -> str:
    """Unpack a source distribution, which comes on standard input, into `workdir` and commit it.

    archive: its file name, for the kind of compression.
    """
    where = shlex.quote(workdir)
    lines = ["set -e", f"mkdir -p {where}"]
    if archive.endswith(".zip"):
        lines += [
            f"mkdir -p {PRIVATE}/sdist && cat > {PRIVATE}/sdist.zip",
            f"$(command -v python || command -v python3) -m zipfile -e {PRIVATE}/sdist.zip {PRIVATE}/sdist",
            f"cp -r {PRIVATE}/sdist/*/. {where}/",
        ]
    else:
        flag = {"bz2": "j", "xz": "J"}.get(archive.rpartition(".")[2], "z")
        lines.append(f"tar -x{flag} --strip-components=1 --no-same-owner -C {where} -f -")
    return "\n".join([*lines, *_commit_lines(where, force=False)]) + "\n"


def git_script(commit: str, workdir: str) -> str:
    """Check a commit out of a bare repository, which comes as a tar on standard input, and commit its tree anew."""
    where, bare = shlex.quote(workdir), f"{PRIVATE}/source.git"
    lines = [
        "set -e",
        f"mkdir -p {where} {bare}",
        f"tar -x --no-same-owner -C {bare} -f -",
        f"git -c safe.directory='*' -c core.bare=false --git-dir={bare} --work-tree={where} "
        f"checkout -q -f {shlex.quote(commit)} -- .",
        f"rm -rf {bare}",
    ]
    return "\n".join([*lines, *_commit_lines(where, force=True)]) + "\n"


def _commit_lines(where: str, *, force: bool) -> list[str]:
    """One commit with fixed author and date; no remotes, tags, reflogs, hooks or unreachable objects.

    force: commit ignored files too: a tree that came from a commit has only what was tracked. A source distribution
    has generated files besides, and what its project ignores is left alone as in a checkout.
    The index is written from the commit, so that it holds no inode numbers and times of the building machine.
    """
    ignored = _IGNORED + ("" if force else "/build/\n")
    git = f"git -c safe.directory='*' -c core.logAllRefUpdates=false -c gc.auto=0 -c pack.threads=1 -C {where}"
    return [
        f"export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_DATE='@{MTIME} +0000' GIT_COMMITTER_DATE='@{MTIME} +0000'",
        "export GIT_AUTHOR_NAME=minisandbox GIT_AUTHOR_EMAIL=minisandbox@localhost",
        "export GIT_COMMITTER_NAME=minisandbox GIT_COMMITTER_EMAIL=minisandbox@localhost",
        f"rm -rf {where}/.git",
        f"git -c init.defaultBranch=main init -q --template= {where}",
        f"mkdir -p {where}/.git/info && printf {shlex.quote(ignored)} > {where}/.git/info/exclude",
        f"{git} add -A{' -f' if force else ''}",
        f"{git} commit -q --allow-empty --no-verify --no-gpg-sign -m 'Initial commit'",
        f"{git} repack -q -a -d && {git} prune-packed -q",
        f"rm -rf {where}/.git/index {where}/.git/logs {where}/.git/COMMIT_EDITMSG",
        f"{git} read-tree HEAD",
        f'test -z "$({git} status --porcelain)"',
        f"rm -f {where}/.git/index && {git} read-tree HEAD",
    ]


def fetch_commit(repository: GitCommit, place: Path) -> IO[bytes]:
    """One commit of a local clone as a tar of a bare repository. Runs no hook, filter or configuration of the clone.

    place: a temporary directory. Raises `InputError` when there is no clone or it lacks the commit.
    """
    clone = Path(repository.clone)
    if not repository.clone or not clone.is_dir():
        raise InputError(
            f"repository {repository.repo} is needed at commit {repository.commit[:12]}, but there is no local clone "
            f"of it{f' at {clone}' if repository.clone else ''}",
            hint="clone it and name the directory above: tasks.repos=DIR",
        )
    bare = place / "source.git"
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(place),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, env=environment, timeout=1800, check=False
            )
        except FileNotFoundError:
            raise MachineError("the program `git` is not on PATH", hint="install git") from None
        return "" if done.returncode == 0 else done.stderr.strip() or f"git exited with {done.returncode}"

    fault = git("init", "--quiet", "--bare", "--template=", str(bare))
    # The clone may belong to another user; only its objects are read, by an upload-pack that is told so.
    serve = "--upload-pack=git -c safe.directory=* -c uploadpack.allowAnySHA1InWant=true upload-pack"
    fault = fault or git(
        "--git-dir",
        str(bare),
        "fetch",
        "--quiet",
        "--depth=1",
        "--no-tags",
        serve,
        clone.absolute().as_uri(),
        repository.commit,
    )
    if fault:
        raise InputError(
            f"the clone {clone} of {repository.repo} cannot give commit {repository.commit}: {fault.splitlines()[-1]}",
            hint=f"git -C {clone} fetch origin {repository.commit}",
        )
    (bare / "FETCH_HEAD").unlink(missing_ok=True)
    file = tempfile.TemporaryFile(dir=place)
    with tarfile.open(fileobj=file, mode="w|") as tar:
        tar.add(bare, arcname=".")
    file.seek(0)
    return file


def repository_words(repository: Sdist | GitCommit) -> Mapping[str, str]:
    """What a lock says of the repository."""
    if isinstance(repository, Sdist):
        return {"sdist": repository.filename, "version": repository.version, "sha256": repository.sha256}
    return {"git": repository.repo, "commit": repository.commit}
