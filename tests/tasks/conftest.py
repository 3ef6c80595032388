"""The default tasks, made once for all tests that look at them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.tasks import Task, load_tasks
from tests import support


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Where releases come from; MINISANDBOX_SOURCES=DIR keeps them between sessions."""
    return Sources(Path(os.environ.get("MINISANDBOX_SOURCES") or tmp_path_factory.mktemp("sources")))


@pytest.fixture(scope="session")
def pypi_tasks(sources: Sources) -> list[Task]:
    support.require("network")
    return load_tasks("pypi", sources=sources, python="3.11")
