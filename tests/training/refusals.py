"""What `test_entrypoint.py` asks where SkyRL is installed: functions for `tests.skyrl.process`."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.training import preflight
from skyrl_minisandbox.training.config import TrainConfig, make_train_config


def refused(keys: list[str], mode: str = "") -> dict[str, Any]:
    """The error of a dotlist; with a mode, that of all checks before Ray starts."""
    try:
        config = make_train_config(keys)
        if mode:
            preflight.check(config, mode)
    except MiniSandboxError as error:
        return {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    return {}


def built(keys: list[str], checked: str = "") -> dict[str, Any]:
    """The whole configuration that a dotlist makes. checked: the mode to check it for."""
    config = make_train_config(keys)
    if checked:
        preflight.check(config, checked)
    whole: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return whole


def differences() -> list[str]:
    """What is lost where the default configuration is taken apart and made again, or sent to a Ray task."""
    config = TrainConfig()
    lost = []
    if make_train_config(dataclasses.asdict(config)) != config:
        lost.append("as a dict")
    if pickle.loads(pickle.dumps(config)) != config:
        lost.append("pickled")
    return lost


def expected_here() -> None:
    """This SkyRL will do."""
    from skyrl_minisandbox.training.entrypoint import expect_skyrl

    expect_skyrl()
