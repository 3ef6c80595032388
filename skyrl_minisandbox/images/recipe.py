"""How to build a task's environment. Plain, hashable data: tasks make it, images build it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sdist(_Frozen):
    """A released source distribution on PyPI, named by what it must hash to."""

    kind: Literal["sdist"] = "sdist"
    package: str
    version: str
    filename: str
    sha256: str


class GitCommit(_Frozen):
    """One commit of a repository; brought from a local clone below `tasks.repos` and stripped of its future.

    clone: the path of that clone on the building machine; not part of the recipe's identity.
    """

    kind: Literal["git"] = "git"
    repo: str
    commit: str
    clone: str = Field(default="", exclude=True)


Repository = Annotated[Sdist | GitCommit, Field(discriminator="kind")]


class Recipe(_Frozen):
    """What an image is built from, bottom up: base, Python with packages, repository, commands.

    base: `host`, `debian`, or later an OCI reference.
    python: `3.11`, found among the interpreters of the building machine; None for a base's own.
    packages: exact pins (`pytest==8.3.5`), installed without dependencies into `/opt/env`.
    build_packages: exact pins needed only to install the repository; part of the same environment layer.
    index_cutoff: ISO date; recorded in the lock, and the bound for anything that is not pinned.
    repository: its tree becomes `workdir`, as one commit without remotes, tags or reflogs.
    commands: run in order in `workdir` with `/opt/env/bin` first on PATH and network; each is a layer.
    env: environment of the image's commands, beside PATH.
    """

    base: str = "host"
    python: str | None = None
    packages: tuple[str, ...] = ()
    build_packages: tuple[str, ...] = ()
    system_packages: tuple[str, ...] = ()
    index_cutoff: str = ""
    repository: Repository | None = None
    commands: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    workdir: str = "/testbed"

    def digest(self) -> str:
        """Hex SHA-256 over the canonical JSON of the recipe; equal recipes have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
