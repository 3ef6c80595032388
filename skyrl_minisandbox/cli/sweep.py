"""`minisandbox train --multirun`: Hydra makes the combinations and launches them, each job a command of its own.

A job is `minisandbox train` with its values, in a process group of its own: nothing of one training is left when the
next begins, and the log says what to type to have one of them again. Any launcher of Hydra's does
(`hydra/launcher=…`); its own runs one job after the other.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_minisandbox.cli.training_tree import load_training, spelled
from skyrl_minisandbox.cli.tree import Tree, config_directory, search_path, translate
from skyrl_minisandbox.errors import InputError, MiniSandboxError
from skyrl_minisandbox.training import entrypoint

ENDING = 180.0
"""Seconds that an interrupted job has, more than a training takes to end its rollouts."""


def sweep(overrides: Sequence[str], tree: Tree) -> int:
    """Check every combination, then run them all. Raises `MiniSandboxError` of a job that failed, at the end."""
    import hydra

    entrypoint.expect_skyrl()
    ours, hydras, out = [], [], ""
    for one in map(spelled, overrides):
        key, _, value = one.partition("=")
        if key == "out":
            out = value.strip("'\"")
        elif key.startswith(("hydra.", "hydra/")):
            hydras.append(one)
        else:
            ours.append(one)
    for combination in combinations(ours):
        _check(combination, tree)
    said = translate(ours, tree, many=True)
    place = Path(out).resolve() if out else Path.cwd() / "runs" / time.strftime("%Y%m%d-%H%M%S")
    own = [f"hydra.sweep.dir='{place}'", "hydra.sweep.subdir=${hydra.job.num}", "hydra.job.name=train"]
    arguments = ["--multirun", *search_path(tree), *own, *hydras, *said.choices, *said.values]
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["minisandbox train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a job's error is told by `main`, as all others are
    try:
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=tree.primary)(job)()
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR") if before[1] is None else os.environ.update(HYDRA_FULL_ERROR=before[1])
    print(f"run directories: {place}")
    return 0


def _check(overrides: Sequence[str], tree: Tree) -> None:
    """What its job would refuse, before the first job has run for hours. Raises `InputError`."""
    from skyrl_minisandbox.training import preflight
    from skyrl_minisandbox.training.config import make_train_config

    training = load_training(overrides, tree)
    config = make_train_config(training.dotlist)
    config.trainer.fully_async.enabled |= training.mode == "async"
    try:
        preflight.check(config, training.mode)
    except InputError as error:
        raise InputError(f"{error.message} (with {' '.join(overrides)})", hint=error.hint) from error


def combinations(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The command lines of the jobs, in Hydra's order. Raises `InputError` for what is no list and no range."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    ways = []
    for text in overrides:
        try:
            one = OverridesParser.create().parse_override(text)
        except HydraException:
            ways.append([text])  # `translate` says what is wrong
            continue
        if not one.is_sweep_override():
            ways.append([text])
        elif one.is_discrete_sweep():
            ways.append([f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()])
        else:
            raise InputError(f"`{text}` names no values", hint=f"{one.key_or_group}=1,2,3 or range(1,4)")
    return map(list, itertools.product(*ways))


def job(cfg: Any) -> None:
    """One job, called by Hydra's launcher. Raises `MiniSandboxError` when it failed."""
    from hydra.core.hydra_config import HydraConfig

    run = HydraConfig.get()
    number, out = run.job.num, run.runtime.output_dir
    said = [one.lstrip("+") for one in run.overrides.task]
    more = list(run.searchpath or [])
    keys = [*said, f"out='{out}'", f"trainer.run_name='{cfg.trainer.run_name}-{number}'"]
    keys += [f"hydra.searchpath=[{','.join(more)}]"] if more else []
    print(f"job {number}: minisandbox train {' '.join(keys)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "skyrl_minisandbox.cli.main", "train", *keys]
    # Its own group: Ctrl-C reaches it once, from here, and a second time would end it without order.
    with subprocess.Popen(command, process_group=0) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code:
        raise MiniSandboxError(f"job {number} of the sweep ended with exit code {code}", hint=f"its files: {out}")
