"""Real pypi tasks with their images, built once per session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from skyrl_minisandbox.images import Cache, Checkout, Sources, Store, build_image
from skyrl_minisandbox.policies import InvertedPolicy, Policy
from skyrl_minisandbox.policies.policy import Message
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds import Scaffold, Submission
from skyrl_minisandbox.tasks import Task, load_tasks
from tests.support import require

TIMEOUT = 120.0


@dataclasses.dataclass
class Place:
    """A task, and fresh sandboxes of its image."""

    task: Task
    checkout: Checkout
    made: list[Sandbox] = dataclasses.field(default_factory=list)

    def open(self) -> Sandbox:
        self.made.append(Sandbox(self.checkout.sandbox_spec()))
        return self.made[-1]


@pytest.fixture
def place(store_directory: Path, cache_directory: Path) -> Iterator[Callable[[str], Place]]:
    """`place(task_id)`: builds the image of that pypi task unless this session has it."""
    require("userns", "overlay", "git", "network")
    store, cache = Store(store_directory), Cache(cache_directory)
    sources = Sources(cache_directory / "sources")
    made: list[Place] = []

    def make(task_id: str) -> Place:
        (task,) = load_tasks("pypi", ids=[task_id], sources=sources)
        image = build_image(task.recipe, store=store, cache=cache, pythons=(), progress=None)
        made.append(Place(task, cache.checkout(image, store)))
        return made[-1]

    yield make
    for one in made:
        for sandbox in one.made:
            sandbox.close()
        one.checkout.release()


@dataclasses.dataclass
class Played:
    submission: Submission
    conversation: list[Message]
    policy: InvertedPolicy


def play(scaffold: Scaffold, task: Task, sandbox: Sandbox, driver: Policy, *, turns: int = 100) -> Played:
    """The order of env.step: the scaffold in a thread, the driver's loop here; stopped after `turns` answers."""
    policy = InvertedPolicy()

    def run() -> Submission:
        try:
            return scaffold.run(task if scaffold.privileged else task.public(), sandbox, policy)
        finally:
            policy.end()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            conversation = policy.first(TIMEOUT) or []
            added: list[Message] | None = [] if conversation else None
            while added is not None and policy.turns < turns:
                text = driver.query(conversation)
                conversation.append({"role": "assistant", "content": text})
                added = policy.answer(text, TIMEOUT)
                conversation += added or []
        finally:
            policy.stop()
        return Played(running.result(TIMEOUT), conversation, policy)
