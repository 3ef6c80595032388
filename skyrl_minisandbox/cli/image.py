"""`minisandbox image build|ls|show`."""

from __future__ import annotations

import dataclasses

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import print_json, print_table
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.images import Image


def run(request: Request) -> int:
    """Build what the tasks need, or tell what is in the store."""
    bench = Workbench(load_settings(request.overrides))
    if request.word == "ls":
        return _list(bench.store.images(), request.json)
    if request.word == "show":
        return _show(bench, request)
    tasks = bench.tasks()
    images = bench.images(tasks)
    if request.json:
        print_json([{"task_id": task.id, **_facts(images[task.id])} for task in tasks])
    else:
        rows = [[task.id, images[task.id].digest, _size(images[task.id])] for task in tasks]
        print_table(["task", "image", "size"], rows, right=[2])
    return 0


def _list(images: list[Image], as_json: bool) -> int:
    if as_json:
        print_json([_facts(image) for image in images])
    else:
        rows = [[image.name, image.digest, str(len(image.layers)), _size(image)] for image in images]
        print_table(["name", "image", "layers", "size"], rows, right=[2, 3])
    return 0


def _show(bench: Workbench, request: Request) -> int:
    task = bench.one_task(request.own.get("task"))
    image = bench.store.find(task.recipe.digest())
    if image is None:
        raise InputError(
            f"the image of task {task.id} is not in the store {bench.store.path}",
            hint=f"minisandbox image build tasks.ids=[{task.id}]",
        )
    if request.json:
        print_json(_facts(image))
        return 0
    print(f"name     {image.name}\ndigest   {image.digest}\nworkdir  {image.workdir}")
    for key, value in sorted(image.env.items()):
        print(f"env      {key}={value}")
    for source, target in image.binds:
        print(f"bind     {source} at {target}, read-only")
    for layer in image.layers:
        print(f"layer    {layer.digest}  {_bytes(layer.size):>9}  {layer.name}")
    return 0


def _facts(image: Image) -> dict[str, object]:
    data = dataclasses.asdict(image)
    data["size"] = sum(layer.size for layer in image.layers)
    return data


def _size(image: Image) -> str:
    return _bytes(sum(layer.size for layer in image.layers))


def _bytes(count: int) -> str:
    """Compressed size as it lies in the store, in powers of 1024."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
