"""`minisandbox train`: SkyRL's trainer with our environment, configured by one Hydra tree."""

from __future__ import annotations

import importlib.util
import sys

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.tree import Tree


def run(request: Request) -> int:
    """Compose, check, train; or print the tree (`--cfg job`), or one run for each combination (`--multirun`).

    The entry point's errors are this command's. Returns 0; 1 is a job of a sweep that failed.
    """
    from skyrl_minisandbox.training import entrypoint

    if importlib.util.find_spec("skyrl") is None:
        entrypoint.expect_skyrl()  # says what is missing
    from skyrl_minisandbox.cli.training_tree import load_training

    tree, overrides = read_tree(request.overrides)
    if request.options & {"--multirun", "-m"}:
        from skyrl_minisandbox.cli.sweep import sweep

        return sweep(overrides, tree)
    training = load_training(overrides, tree)
    if "--cfg job" in request.options:
        import yaml

        yaml.safe_dump(training.tree, sys.stdout, sort_keys=False, allow_unicode=True)
        return 0
    figures = entrypoint.run(training.dotlist, training.mode)
    for name, value in sorted((figures or {}).items()):
        print(f"{name}: {value}")
    return 0


def read_tree(overrides: tuple[str, ...]) -> tuple[Tree, list[str]]:
    """The tree with the directories of `hydra.searchpath=[DIR]` in it, and the overrides that are left.

    Raises `InputError` for a directory that is not there.
    """
    from pathlib import Path

    from skyrl_minisandbox.cli.training_tree import training_tree
    from skyrl_minisandbox.errors import InputError

    key = "hydra.searchpath="
    more: list[str] = []
    for one in overrides:
        if one.startswith(key):
            more += [path.strip().removeprefix("file://") for path in one.removeprefix(key).strip("[] ").split(",")]
    for path in more:
        if not Path(path).is_dir():
            raise InputError(
                f"`{key}[…]`: there is no directory {path}", hint="in it: experiment/mine.yaml, model/mine.yaml"
            )
    found = [str(Path(path).resolve()) for path in more]
    return training_tree(*found), [one for one in overrides if not one.startswith(key)]
