"""An interpreter is found where it was said to be, and its copy stands on its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.images import interpreters
from skyrl_minisandbox.images.build import build_image
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.images.store import Store
from tests import support
from tests.support import needs

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_the_running_interpreter_is_found_without_being_named() -> None:
    found = interpreters.find(HERE, [])
    assert found.short == HERE
    assert os.path.realpath(found.prefix) == os.path.realpath(sys.base_prefix) or found.of_base


def test_a_missing_version_is_named_with_every_place_that_was_looked_in(tmp_path: Path) -> None:
    (tmp_path / "pythons/3.99/bin").mkdir(parents=True)
    broken = tmp_path / "pythons/3.99/bin/python3.42"
    broken.write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(InputError) as caught:
        interpreters.find("3.42", [str(tmp_path / "pythons")])
    assert caught.value.message.startswith("no Python 3.42 was found on this machine; looked in ")
    assert f"{tmp_path}/pythons/3.99 (its python3.42 does not run: it is broken)" in caught.value.message
    assert "/usr" in caught.value.message and "images.pythons=[DIR]" in caught.value.hint


def test_a_directory_that_does_not_exist_is_the_users_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a directory"):
        interpreters.find(HERE, [str(tmp_path / "none")])


def test_a_directory_of_prefixes_is_searched_newest_first(tmp_path: Path) -> None:
    for name in ("3.7.9", "3.7.16"):
        (tmp_path / name / "bin").mkdir(parents=True)
        program = tmp_path / name / "bin/python3.7"
        numbers = ", ".join(name.split("."))
        program.write_text(f'#!/bin/sh\necho \'[[{numbers}], "{tmp_path}/{name}", "/x", "cpython"]\'\n')
        program.chmod(0o755)
    assert interpreters.find("3.7", [str(tmp_path)]).version == "3.7.16"
    assert interpreters.find("3.7.9", [str(tmp_path)]).version == "3.7.9"


def test_a_copy_leaves_out_what_no_task_needs_and_forgets_where_it_came_from(tmp_path: Path) -> None:
    found = interpreters.find(HERE, [])
    target = tmp_path / "copy"
    target.mkdir()
    interpreters.copy_prefix(found, target, host_usr=True)
    stdlib = target / "lib" / f"python{HERE}"
    assert (stdlib / "os.py").is_file() and (stdlib / "venv").is_dir()
    for name in ("test", "idlelib", "turtledemo", "unittest/test", "__pycache__"):
        assert not (stdlib / name).exists()
    assert os.listdir(stdlib / "site-packages") == []
    assert not [path for path in target.rglob("*") if path.suffix == ".a" or path.name == "__pycache__"]
    if not found.of_base:
        texts = [*stdlib.glob("_sysconfigdata*.py"), *stdlib.glob("config-*/Makefile")]
        assert texts and not [path for path in texts if str(found.prefix) in path.read_text(errors="replace")]
    done = subprocess.run(
        [target / "bin/python", "-I", "-c", "import ssl, sqlite3, sys; print(sys.prefix)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={},
    )
    assert done.stdout.strip() == str(target)
    libraries = list((target / "lib").glob("*.so*"))
    for binary in [target / "bin" / f"python{HERE}"] * bool(libraries):
        dynamic = subprocess.run(
            [interpreters._patchelf(), "--print-rpath", binary], capture_output=True, text=True, timeout=60, check=True
        )
        assert dynamic.stdout.strip() == "$ORIGIN/../lib"


@pytest.mark.ci
@needs("overlay", "network")
@pytest.mark.parametrize(
    "version", [pytest.param("3.9", marks=needs("python3.9")), pytest.param("3.12", marks=needs("python3.12"))]
)
def test_an_interpreter_from_outside_the_base_runs_inside(version: str, store: Store, cache: Cache) -> None:
    from skyrl_minisandbox.sandbox import Sandbox

    prefix = support.find_python(version)
    assert prefix is not None
    if prefix == Path("/usr"):
        pytest.skip(f"the only Python {version} here is the base's own")
    recipe = Recipe(python=version, packages=("iniconfig==2.0.0",))
    image = build_image(recipe, store=store, cache=cache, pythons=[str(prefix)])
    with cache.checkout(image, store) as checkout, Sandbox(checkout.sandbox_spec()) as sandbox:
        program = (
            "import sys, ssl, sqlite3, ctypes, lzma, bz2, iniconfig; print(sys.version.split()[0], sys.base_prefix)"
        )
        result = sandbox.run(["python", "-c", program], timeout=60)
        assert re.fullmatch(rf"{re.escape(version)}\.\d+ /opt/python/{re.escape(version)}\n", result.output)
        assert "LD_LIBRARY_PATH" not in sandbox.run("env", timeout=60).output
        assert str(prefix) not in sandbox.run("cat /proc/self/maps", timeout=60).output
        # Compiled ahead, so that nothing is compiled again in each sandbox.
        verbose = sandbox.run("python -v -c 'import json, iniconfig' 2>&1", timeout=60).output
        assert re.search(r"code object from .*iniconfig.*\.pyc", verbose)
        assert not re.search(r"code object from '?[^']*\.py'?$", verbose, re.MULTILINE)
    assert image.lock["python"].startswith(version) and "iniconfig==2.0.0" in image.lock["packages"]
