"""Linters are tests: what they say is settled before a change lands."""

from __future__ import annotations

import subprocess
import sys

from tests.support import REPOSITORY, needs


def clean(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs("ruff")
def test_ruff_has_nothing_to_say() -> None:
    clean("ruff", "check", ".")


@needs("mypy")
def test_mypy_strict_has_nothing_to_say() -> None:
    clean("mypy")


def test_shell_scripts_parse() -> None:
    scripts = [REPOSITORY / ".ci" / "run", *(REPOSITORY / "scripts").glob("[!.]*")]
    found = [path for path in scripts if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")]
    assert len(found) >= 3
    for path in found:
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
