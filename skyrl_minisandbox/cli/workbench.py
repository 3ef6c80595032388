"""What most verbs work on: the tasks, their images, and sandboxes of them on this machine."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

from skyrl_minisandbox.cli.output import Progress
from skyrl_minisandbox.cli.settings import Settings
from skyrl_minisandbox.errors import BuildError, InputError, MachineError, MiniSandboxError

if TYPE_CHECKING:
    from skyrl_minisandbox.images import Cache, Image, Store
    from skyrl_minisandbox.images.sources import Sources
    from skyrl_minisandbox.sandbox import Sandbox
    from skyrl_minisandbox.tasks import Task


class Workbench:
    """Settings, and what they name: made when first asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @functools.cached_property
    def store(self) -> Store:
        """The image store."""
        from skyrl_minisandbox.images import Store

        return Store(self.settings.env.images.store)

    @functools.cached_property
    def cache(self) -> Cache:
        """This machine's cache."""
        from skyrl_minisandbox.images import Cache

        return Cache(self.settings.env.images.cache)

    @functools.cached_property
    def sources(self) -> Sources:
        """Source distributions, kept below the cache."""
        from skyrl_minisandbox.images.sources import Sources

        return Sources(self.cache.path / "sources")

    def tasks(self, ids: Sequence[str] | None = None) -> list[Task]:
        """The tasks that the configuration names, or those of `ids` among its family. Raises `InputError`."""
        from skyrl_minisandbox.tasks import load_tasks

        chosen = self.settings.env.tasks
        tasks = load_tasks(
            chosen.name,
            ids=list(ids) if ids is not None else chosen.ids or None,
            repos=chosen.repos or None,
            sources=self.sources,
            base=chosen.base,
            python=chosen.python or None,
            path=chosen.path or None,
            validation=chosen.validation or None,
        )
        if not tasks:
            raise InputError(f"tasks={chosen.name} has no tasks", hint="minisandbox tasks list")
        return tasks

    def one_task(self, given: str | None) -> Task:
        """The task of `task=ID`, or the only one of `tasks.ids`. Raises `InputError`."""
        ids = [given] if given else self.settings.env.tasks.ids
        if len(ids) != 1:
            raise InputError("which task?", hint="task=ID; `minisandbox tasks list` prints the ids")
        return self.tasks(ids)[0]

    def images(self, tasks: Sequence[Task]) -> dict[str, Image]:
        """The image of each task by task id, built where it is missing, `builds` of them at a time.

        Every build gets its chance; then the first failure is raised, with the number of the others.
        """
        found, failed = self.built(tasks)
        if failed:
            raise build_failure(list(failed.items()), len(tasks))
        return found

    def built(self, tasks: Sequence[Task]) -> tuple[dict[str, Image], dict[str, MiniSandboxError]]:
        """The image of each task by task id, and why the others have none.

        Raises `MachineError` in the end where one was in the way: that is no task's doing.
        """
        from skyrl_minisandbox.images import build_image

        missing = [task for task in tasks if self.store.find(task.recipe.digest()) is None]
        found: dict[str, Image] = {}
        failed: dict[str, MiniSandboxError] = {}

        def build(task: Task, progress: Callable[[str], None] | None) -> None:
            try:
                found[task.id] = build_image(
                    task.recipe,
                    store=self.store,
                    cache=self.cache,
                    pythons=self.settings.env.images.pythons,
                    progress=progress,
                    name=task.id,
                    sources=self.sources,
                )
            except MiniSandboxError as error:
                failed[task.id] = error

        if missing:
            with Progress("images to build", len(missing)) as progress:

                def one(task: Task) -> None:
                    build(task, lambda text: progress.say(task.id, text))
                    progress.done(task.id, "failed" if task.id in failed else "built")

                in_threads([functools.partial(one, task) for task in missing], self.settings.builds)
        for task in tasks:
            if task.id not in found and task.id not in failed:
                build(task, None)  # the stored one, if it fits this machine
        machine = [(name, error) for name, error in failed.items() if isinstance(error, MachineError)]
        if machine:
            raise build_failure(machine, len(tasks))
        return found, failed

    @contextmanager
    def opener(self, image: Image) -> Iterator[Callable[..., Sandbox]]:
        """Check the image out for as long as this lasts; gives what opens a fresh sandbox of it.

        That takes `network`, `none` (the default) or `host`.
        """
        from skyrl_minisandbox.sandbox import Sandbox

        config = self.settings.env.sandbox
        with self.cache.checkout(image, self.store) as checkout:

            def open_sandbox(network: str = "none") -> Sandbox:
                spec = checkout.sandbox_spec(
                    limits=config.limits(),
                    network=network,
                    allow_degraded=tuple(config.allow_degraded),
                    on_disk=config.upper == "disk",
                )
                return Sandbox(spec)

            yield open_sandbox


def build_failure(failed: Sequence[tuple[str, MiniSandboxError]], total: int) -> MiniSandboxError:
    """One error for the images that have none. failed: task id and reason, of `total` tasks."""
    first = failed[0][1]
    if len(failed) == 1:
        return first
    lines = "".join(f"\n  {task}: {error.message}" for task, error in failed)
    failure = type(first) if len({type(error) for _, error in failed}) == 1 else BuildError
    return failure(f"{len(failed)} of {total} images could not be built:{lines}", hint=first.hint)


def end_sandboxes() -> None:
    """End every sandbox of this process; whoever waits for one gets `SandboxGone`."""
    if "skyrl_minisandbox.sandbox" in sys.modules:
        from skyrl_minisandbox.sandbox import shutdown_launcher

        shutdown_launcher()


def in_threads(jobs: Sequence[Callable[[], None]], count: int, *, on_error: Callable[[], None] = end_sandboxes) -> None:
    """Run jobs in `count` threads until all are done, or one raises, or the user interrupts.

    on_error: makes the jobs that still run come to an end; what they raise then is not looked at. No job
        starts after the first that raised: it would find what `on_error` ended, or start it again.
    """
    ending = threading.Event()

    def one(job: Callable[[], None]) -> None:
        if ending.is_set():
            return
        try:
            job()
        except BaseException:
            ending.set()
            raise

    pool = ThreadPoolExecutor(max_workers=max(1, min(count, len(jobs))), thread_name_prefix="minisandbox")
    pending: set[Future[None]] = {pool.submit(one, job) for job in jobs}
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        ending.set()
        pool.shutdown(wait=False, cancel_futures=True)
        on_error()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
