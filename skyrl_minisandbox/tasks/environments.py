"""How the environments of SWE-bench's repositories are built: facts of its releases up to 4.1, as recipe parts.

The facts are in `swebench_environments.json` (an environment per pin set, a specification per set of
commands, and which of both an instance has). They are used with a few rules, because ours are built
without conda, with exact pins only, and never need a network when tests run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("swebench_environments.json")

# Python 3.5 cannot be had any more; both instances that name it pass on 3.6.
_PYTHON = {"3.5": "3.6"}

# The freezes hold what tests import; what builds the project came and went in pip's build isolation.
_BUILD: dict[str, tuple[str, ...]] = {
    "pytest-dev/pytest": ("setuptools-scm==7.1.0", "tomli==2.0.1", "typing-extensions==4.12.2"),
    "pydata/xarray": ("setuptools-scm==7.1.0", "tomli==2.0.1", "typing-extensions==4.12.2"),
    "mwaskom/seaborn": ("flit-core==3.9.0",),
    "sphinx-doc/sphinx": ("flit-core==3.9.0",),
}

# conda's freeze leaves out namespace packages; bounds as in the specifications' own `sed` lines.
_OMITTED: dict[str, tuple[str, ...]] = {
    "sphinx-doc/sphinx": (
        "sphinxcontrib-applehelp==1.0.4",
        "sphinxcontrib-devhelp==1.0.2",
        "sphinxcontrib-htmlhelp==2.0.1",
        "sphinxcontrib-jsmath==1.0.1",
        "sphinxcontrib-qthelp==1.0.3",
        "sphinxcontrib-serializinghtml==1.1.5",
    ),
}

# No wheel of it is published, and nothing else needs a compiler. Django's tests of it need a server besides, which
# SWE-bench's images do not have either: they are skipped with it and without it.
_LEFT_OUT = {"django/django": frozenset({"pywatchman"})}

_SETUPTOOLS_WITH_PEP_660 = 64

# A clone without tags has no version for setuptools-scm.
_VERSION_FROM_TAGS = frozenset({"astropy/astropy", "matplotlib/matplotlib", "pydata/xarray", "pytest-dev/pytest"})

# `tox --current-env` inside a virtual environment runs the interpreter that it was made from.
_TEST_COMMAND = {"sphinx-doc/sphinx": "python -X dev -m pytest -rA --durations 25"}

_APT = re.compile(r"apt-get\b.*\binstall\s+(?:-\S+\s+)*(.+)$")
_LOCALES = re.compile(r"locale[.-]gen")
_EXPORT = re.compile(r"export (\w+)=(\S*)$")


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a recipe needs beside the repository. test_command: without the test files at its end."""

    python: str
    packages: tuple[str, ...]
    build_packages: tuple[str, ...]
    system_packages: tuple[str, ...]
    commands: tuple[str, ...]
    env: dict[str, str]
    test_command: str


def environment(instance_id: str, repo: str, version: str) -> Environment | None:
    """The environment of an instance; of another one with the same repository and version; or None."""
    facts = _facts()
    entry = facts["instances"].get(instance_id) or _by_version().get((repo.replace("/", "__"), version))
    if entry is None:
        return None
    name, version, specification = entry
    spec = facts["specifications"][specification]
    python = _PYTHON.get(facts["environments"][name]["python"], facts["environments"][name]["python"])
    packages = _add(facts["environments"][name]["pins"], _OMITTED.get(repo, ()))
    packages = tuple(pin for pin in packages if _name(pin) not in _LEFT_OUT.get(repo, ()))
    system, before = _prepare(spec["pre_install"])
    install = _install(spec["install"], python, isolated=_too_old_to_build(packages, python))
    if repo in _VERSION_FROM_TAGS:
        install = f"SETUPTOOLS_SCM_PRETEND_VERSION={version}.0 {install}"
    return Environment(
        python=python,
        packages=packages,
        build_packages=tuple(pin for pin in _BUILD.get(repo, ()) if _name(pin) not in map(_name, packages)),
        system_packages=system,
        commands=(*before, install),
        env=_variables(spec["eval_commands"]),
        test_command=_TEST_COMMAND.get(repo, spec["test_cmd"]),
    )


def _too_old_to_build(packages: Sequence[str], python: str) -> bool:
    """Whether the environment's setuptools cannot make an editable installation the way that its pip asks for."""
    versions = [pin.partition("==")[2] for pin in packages if _name(pin) == "setuptools"]
    return python != "3.6" and any(int(version.split(".")[0]) < _SETUPTOOLS_WITH_PEP_660 for version in versions)


def _install(line: str, python: str, *, isolated: bool = False) -> str:
    """The project itself, its dependencies being there already. isolated: built with what it says it is built with.

    A setuptools finder instead of a path would hide the project's directory from what walks `sys.path`
    (pylint's plugins), hence `editable_mode=compat`; the last pip for Python 3.6 does not have the option,
    nor the finder.
    """
    words = line.replace("python -m pip install", "").split()
    if line.startswith("python -m pip install"):
        options = ["--no-deps"] if isolated else ["--no-deps", "--no-build-isolation"]
        if "-e" in words:
            if python != "3.6":
                options.append("-C editable_mode=compat")
            options.append("-e")
        return f"python -m pip install {' '.join(options)} ."
    return line


def _prepare(lines: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Debian packages, and one command of what else comes before the installation (its lines share variables)."""
    packages: list[str] = []
    others: list[str] = []
    for line in lines:
        if found := _APT.search(line):
            packages += [word for word in found[1].split() if word != "locales"]
        elif not _LOCALES.search(line):
            others.append(line)
    return tuple(packages), ("\n".join(["set -e", *others]),) if others else ()


def _variables(lines: Sequence[str]) -> dict[str, str]:
    """What is exported before the tests. Bases have no other UTF-8 locale than C.UTF-8, which does as well."""
    env: dict[str, str] = {}
    for line in lines:
        if found := _EXPORT.match(line):
            env[found[1]] = found[2].replace("en_US.UTF-8", "C.UTF-8").replace("en_US:en", "C")
    return env


def _add(pins: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    have = {_name(pin) for pin in pins}
    return (*pins, *(pin for pin in more if _name(pin) not in have))


def _name(pin: str) -> str:
    return re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower()


@functools.cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(FACTS.read_text("utf-8"))
    return facts


@functools.cache
def _by_version() -> dict[tuple[str, str], list[Any]]:
    """For rows of other splits: the first instance of each repository and version."""
    table: dict[tuple[str, str], list[Any]] = {}
    for instance_id, entry in _facts()["instances"].items():
        table.setdefault((instance_id.rpartition("-")[0], entry[1]), entry)
    return table
