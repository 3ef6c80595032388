"""Processes with SkyRL's trainer in them, one per version for the whole session: their imports take long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.skyrl.process import TrainerProcess
from tests.small import build_small_image


class Trainers:
    """By version; one that had to be killed is made anew."""

    def __init__(self) -> None:
        self._processes: dict[str, TrainerProcess] = {}

    def call(self, version: str, function: str, *, timeout: float, **arguments: Any) -> Any:
        """As `TrainerProcess.call`; the end of its log is printed, for a test that fails after it."""
        if version not in self._processes:
            self._processes[version] = TrainerProcess(version)
        process = self._processes[version]
        try:
            result = process.call(function, timeout=timeout, **arguments)
        except AssertionError:
            self._processes.pop(version).close()
            raise
        print(process.log())
        return result

    def close(self) -> None:
        for process in self._processes.values():
            process.close()


@pytest.fixture(scope="session")
def trainers() -> Iterator[Trainers]:
    found = Trainers()
    yield found
    found.close()


@pytest.fixture(scope="session")
def small_images(store_directory: Path, cache_directory: Path) -> dict[str, str]:
    """The section `images` of a config that has the image of every small task."""
    build_small_image(store_directory, cache_directory)
    return {"store": str(store_directory), "cache": str(cache_directory)}
