"""What the tests of `minisandbox train`'s tree ask of a process that has SkyRL."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

from skyrl_minisandbox.cli.main import main
from skyrl_minisandbox.cli.training_tree import load_training, training_tree
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.training import preflight
from skyrl_minisandbox.training.config import TrainConfig, make_train_config
from skyrl_minisandbox.training.declared import flat, sentences


def plain(keys: list[str]) -> dict[str, Any]:
    """The tree and its mode, dotlist and optional keys."""
    tree = training_tree()
    training = load_training(keys, tree)
    return {"tree": training.tree, "mode": training.mode, "dotlist": training.dotlist}


def built(keys: list[str]) -> dict[str, Any]:
    """What the trainer gets for a command line of ours."""
    return dataclasses.asdict(make_train_config(load_training(keys, training_tree()).dotlist))


def dotlist(keys: list[str]) -> dict[str, Any]:
    """What the trainer gets for SkyRL's own command line."""
    return dataclasses.asdict(make_train_config(keys))


def key_names() -> list[str]:
    """Every leaf of the dataclasses, those of optional sections too."""
    return list(sentences(TrainConfig))


def tree_keys() -> dict[str, list[str]]:
    """Every key of the tree, and those below keys that are null."""
    tree = training_tree()
    found = load_training([], tree).tree
    optional = {key: sorted(flat(dict(inside))) for key, inside in tree.optional.items()}
    return {"keys": sorted(flat(found, tree.open)), "open": sorted(tree.open), **optional}


def checked(keys: list[str]) -> dict[str, Any]:
    """Compose and check as the entry point does, without looking for the data's images."""
    training = load_training(keys, training_tree())
    config = make_train_config(training.dotlist)
    before, preflight.check_images = preflight.check_images, lambda cfg, mode: None
    try:
        preflight.check(config, training.mode)
    finally:
        preflight.check_images = before
    placement, engine = config.trainer.placement, config.generator.inference_engine
    return {
        "mode": training.mode,
        "async": config.trainer.fully_async.enabled,
        "gpus": placement.policy_num_nodes * placement.policy_num_gpus_per_node,
        "engine_gpus": engine.num_engines * engine.tensor_parallel_size,
        "colocate": placement.colocate_all,
        "lora": config.trainer.policy.model.lora.rank,
        "model": config.trainer.policy.model.path,
        "longest": config.generator.max_input_length + config.generator.sampling_params.max_generate_length,
        "max_model_len": engine.engine_init_kwargs.get("max_model_len"),
    }


def refused(keys: list[str]) -> list[str]:
    """The message and hint of what is refused."""
    try:
        make_train_config(load_training(keys, training_tree()).dotlist)
    except InputError as error:
        return [error.message, error.hint]
    raise AssertionError(f"{keys} were taken")


def command(arguments: list[str]) -> list[Any]:
    """`minisandbox` with these: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return [code, out.getvalue(), err.getvalue()]
