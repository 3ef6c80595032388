"""A run directory: results.jsonl, predictions.jsonl, trajectories/, config.yaml.

Lines are appended and flushed as rollouts end, so that a run which is cut off keeps what it had.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import IO, Any

from skyrl_minisandbox.errors import InputError, MachineError
from skyrl_minisandbox.record import RolloutRecord


class RunDirectory:
    """Made at once; closed at the end. Thread-safe.

    Raises `InputError` where another run's results lie already, `MachineError` where it cannot be written.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        check_unused(path)
        self.path = path
        self._lock = threading.Lock()  # keeps lines whole
        self._results: IO[str] | None = None
        self._predictions: IO[str] | None = None
        try:
            (path / "trajectories").mkdir(parents=True, exist_ok=True)
            self._results = (path / "results.jsonl").open("x")
            self._predictions = (path / "predictions.jsonl").open("w")
            (path / "config.yaml").write_text(_yaml(config))
        except OSError as error:
            self.close()
            raise MachineError(
                f"the run directory {path} cannot be written: {error.strerror}", hint="name another: out=DIR"
            ) from error

    def add(self, record: RolloutRecord, patch: str, model: str, details: dict[str, Any]) -> None:
        """Write one finished rollout.

        details: what the trajectory file holds beside the record: conversation, tests, log. A full disk is a
        `MachineError`: the lines so far are whole.
        """
        prediction = {"instance_id": record.task_id, "model_name_or_path": model, "model_patch": patch}
        assert self._results is not None and self._predictions is not None
        try:
            with self._lock:
                self._append(self._results, record.to_json())
                self._append(self._predictions, prediction)
            name = f"{record.rollout_id}.json"
            text = json.dumps({**record.to_json(), **details}, indent=1, default=str)
            (self.path / "trajectories" / name).write_text(text, errors="backslashreplace")
        except OSError as error:
            raise MachineError(
                f"the result of task {record.task_id} cannot be written to {self.path}: {error.strerror}",
                hint=f"df -h {self.path}",
            ) from error

    @staticmethod
    def _append(file: IO[str], data: dict[str, Any]) -> None:
        file.write(json.dumps(data) + "\n")
        file.flush()

    def close(self) -> None:
        """Idempotent."""
        for file in (self._results, self._predictions):
            if file is not None:
                file.close()


def check_unused(path: Path) -> None:
    """Raises `InputError` where another run's results lie."""
    if (path / "results.jsonl").exists():
        raise InputError(
            f"the run directory {path} holds the results of another run",
            hint="name another: out=DIR, or remove it",
        )


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False)
