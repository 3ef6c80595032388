"""What can be refused before Ray starts and engines load: minutes later it would cost a node's time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import validate_generator_cfg

from skyrl_minisandbox.env import ENV_ID, find_task
from skyrl_minisandbox.errors import InputError, TaskError
from skyrl_minisandbox.images.store import Store, StoreNotInitialised
from skyrl_minisandbox.training.config import REFUSALS, TrainConfig
from skyrl_minisandbox.training.experiment import find_experiment

logger = logging.getLogger(__name__)

ENV_WORKERS = 32
"""Threads of the Env's pool beyond `running`, for episodes that end while others start. SkyRL's default, too."""

SHOWN = 8
"""Names of images that an error lists."""


def check(cfg: TrainConfig, mode: str) -> None:
    """Raises `InputError`: SkyRL's own refusals, then ours. May size `max_env_workers`, as SkyRL sets keys here."""
    find_experiment(mode)
    try:
        (validate_generator_cfg if mode == "generate" else validate_cfg)(cfg)
    except REFUSALS as error:
        raise InputError(f"SkyRL refuses the configuration: {error or type(error).__name__}") from error
    if mode == "generate":
        cfg.trainer.eval_interval = 1  # SkyRL reads no `data.val_data` otherwise
    _check_generator(cfg)
    _check_lengths(cfg)
    if cfg.trainer.fully_async.enabled and mode != "generate":
        _check_async(cfg)
    _size_env_workers(cfg)
    check_images(cfg, mode)


def _check_generator(cfg: TrainConfig) -> None:
    generator = cfg.generator
    if generator.batched:
        raise InputError("`generator.batched=true` generates without an environment", hint="generator.batched=false")
    if generator.vision_language_generator:
        raise InputError(
            "`generator.vision_language_generator=true`: our generator is the one for text",
            hint="generator.vision_language_generator=false",
        )
    if generator.max_turns <= 1:
        raise InputError(
            f"`generator.max_turns={generator.max_turns}` ends every rollout at its first answer",
            hint="generator.max_turns=50",
        )


def _check_lengths(cfg: TrainConfig) -> None:
    """A prompt that is still allowed to be answered must leave room for the answer, or the engine refuses it."""
    generator = cfg.generator
    longest = (generator.inference_engine.engine_init_kwargs or {}).get("max_model_len")
    answers = {"sampling_params": generator.sampling_params, "eval_sampling_params": generator.eval_sampling_params}
    for name, params in answers.items():
        if longest is None or params is None:
            continue
        needed = generator.max_input_length + params.max_generate_length
        if needed > longest:
            raise InputError(
                f"`generator.max_input_length={generator.max_input_length}` and `generator.{name}.max_generate_length="
                f"{params.max_generate_length}` are together more than the engine's max_model_len={longest}: it would "
                "refuse the longest prompts, and SkyRL the whole batch",
                hint=f"generator.inference_engine.engine_init_kwargs.max_model_len={needed}",
            )


def _check_async(cfg: TrainConfig) -> None:
    """What SkyRL's asynchronous trainer would refuse once the engines are up."""
    trainer = cfg.trainer
    knobs = trainer.fully_async
    if trainer.train_batch_size != trainer.policy_mini_batch_size:
        raise InputError(
            f"fully asynchronous training needs `trainer.train_batch_size={trainer.train_batch_size}` and "
            f"`trainer.policy_mini_batch_size={trainer.policy_mini_batch_size}` to be the same",
            hint=f"trainer.train_batch_size={trainer.policy_mini_batch_size}",
        )
    if trainer.placement.colocate_all:
        raise InputError(
            "fully asynchronous training needs engines on GPUs of their own",
            hint="trainer.placement.colocate_all=false",
        )
    most = trainer.policy_mini_batch_size * (knobs.max_staleness_steps + 1)
    if not trainer.policy_mini_batch_size <= knobs.num_parallel_generation_workers <= most:
        raise InputError(
            "`trainer.fully_async.num_parallel_generation_workers="
            f"{knobs.num_parallel_generation_workers}` must be from policy_mini_batch_size="
            f"{trainer.policy_mini_batch_size} to policy_mini_batch_size * (max_staleness_steps + 1) = {most}",
            hint=f"trainer.fully_async.num_parallel_generation_workers={most}",
        )
    if trainer.algorithm.dynamic_sampling.type is not None:
        raise InputError(
            "fully asynchronous training knows no dynamic sampling",
            hint="trainer.algorithm.dynamic_sampling.type=null, and trainer.fully_async.sample_full_batch=true instead",
        )


def _size_env_workers(cfg: TrainConfig) -> None:
    """Every running rollout may be in a call at once. Where `running` follows the nodes, the generator does it."""
    gym, running = cfg.environment.skyrl_gym, cfg.ours.training.running
    if gym.max_env_workers <= 0:
        raise InputError(
            f"`environment.skyrl_gym.max_env_workers={gym.max_env_workers}` runs every rollout on one event loop, "
            "one after the other",
            hint="environment.skyrl_gym.max_env_workers=32",
        )
    if running and gym.max_env_workers < running + ENV_WORKERS:
        gym.max_env_workers = running + ENV_WORKERS


def check_images(cfg: TrainConfig, mode: str) -> None:
    """Every task of the data has its image in the store. Data sets of a hub are not looked at.

    Raises `InputError` for a file that is not there, `TaskError` for a row that is no task.
    """
    if mode == "generate" and not cfg.data.val_data:
        raise InputError("an evaluation needs `data.val_data`", hint="minisandbox tasks export out=DIR makes it")
    wanted: dict[str, tuple[str, str]] = {}  # recipe digest -> a task with it, and the task set where that is
    for key, source in _sources(cfg, mode):
        for extras in _rows(cfg, key, source):
            try:
                task = find_task(cfg.ours, extras)
            except TaskError as error:
                raise TaskError(f"`{key}`: {source}: {error.message}", hint=error.hint) from error
            family = task.source if "task" in extras else cfg.ours.tasks.name
            wanted.setdefault(task.recipe.digest(), (task.id, family))
    if not wanted:
        return
    store = cfg.ours.images.store
    try:
        find = Store(store, create=False).find
    except StoreNotInitialised:
        missing = list(wanted.values())
    else:
        missing = [found for digest, found in wanted.items() if find(digest) is None]
    if missing:
        ids = [task_id for task_id, _ in missing]
        said = ", ".join(ids[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        chosen = "" if len(missing) == len(wanted) else f" 'tasks.ids=[{','.join(ids)}]'"
        sources = {source or "…" for _, source in missing}  # a row may carry a task of nobody knows where
        where = f"tasks={sources.pop()}{chosen}" if len(sources) == 1 else "with the tasks of that data"
        raise InputError(
            f"{len(missing)} of {len(wanted)} images are not in the store {store}: those of {said}",
            hint=f"minisandbox image build {where} images.store={store}",
        )


def _sources(cfg: TrainConfig, mode: str) -> Iterator[tuple[str, str]]:
    """The data that this run reads: its key and a file or the name of a data set."""
    lists = [] if mode == "generate" else [("data.train_data", cfg.data.train_data)]
    if mode == "generate" or cfg.trainer.eval_interval > 0:
        lists.append(("data.val_data", cfg.data.val_data))
    for key, sources in lists:
        for source in [sources] if isinstance(sources, str) else sources or []:
            yield key, source


def _rows(cfg: TrainConfig, key: str, source: str) -> Iterator[Mapping[str, Any]]:
    """What tells the task of each row that is ours, each distinct one once."""
    ending = os.path.splitext(source)[1].lower()
    if ending not in (".parquet", ".json", ".jsonl"):
        logger.info("%s: the images of data set %s are not looked for before they are needed", key, source)
        return
    if not os.path.isfile(source):
        raise InputError(f"`{key}`: there is no file {source}", hint="minisandbox tasks export out=DIR makes them")
    seen: set[str] = set()
    for row in _parquet(source) if ending == ".parquet" else _json(source):
        if (row.get("env_class") or cfg.environment.env_class) != ENV_ID:
            continue
        extras = {name: row[name] for name in ("task", "task_id") if row.get(name) is not None}
        which = repr(extras)
        if which not in seen:
            seen.add(which)
            yield extras


def _parquet(source: str) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet  # SkyRL has it

    file = parquet.ParquetFile(source)
    columns = [name for name in ("env_class", "task", "task_id") if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _json(source: str) -> Iterator[Mapping[str, Any]]:
    with open(source) as file:
        text = file.read()
    try:
        rows = json.loads(text)
    except ValueError:  # a line a row
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    yield from rows if isinstance(rows, list) else [rows]


