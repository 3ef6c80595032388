"""A run directory.

    results.jsonl         a line for each rollout: the RolloutRecord
    predictions.jsonl     the patches in SWE-bench's format
    trajectories/ID.json  what the scaffold and the policy said; nothing of the hidden tests
    grades/ID.json        the record with its TestReport: each test, canaries, retries, the end of the log
    config.yaml           the whole configuration
    driver.log, logs/     what this process and those of the nodes had to say

Lines are appended and flushed as rollouts end, so that a run which is cut off keeps what it had.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping
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
        self._new = not path.exists()
        self._log: logging.Handler | None = None
        self._lock = threading.Lock()  # keeps lines whole
        self._results: IO[str] | None = None
        self._predictions: IO[str] | None = None
        try:
            for name in ("trajectories", "grades"):
                (path / name).mkdir(parents=True, exist_ok=True)
            self._results = (path / "results.jsonl").open("x")
            self._predictions = (path / "predictions.jsonl").open("w")
            (path / "config.yaml").write_text(_yaml(config))
            self._log = logging.FileHandler(path / "driver.log")
        except OSError as error:
            self.close()
            raise MachineError(
                f"the run directory {path} cannot be written: {error.strerror}", hint="name another: out=DIR"
            ) from error
        # What the driver's process logs would tear the display apart, and says more than a user asked for.
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._log)

    def add(self, record: RolloutRecord, model: str, metadata: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Write one finished rollout.

        metadata: of its last `step`; empty when it got no end.
        Raises `MachineError` for a full disk; the lines so far are whole.
        """
        patch = metadata.get("patch", "")
        prediction = {"instance_id": record.task_id, "model_name_or_path": model, "model_patch": patch}
        said = {
            **record.to_json(),
            "history_divergence": metadata.get("history_divergence", 0),
            "metrics": dict(metrics),
            "trajectory": metadata.get("trajectory", {}),
        }
        graded = grade_json(record, metadata.get("report"))
        assert self._results is not None and self._predictions is not None
        try:
            for directory, data in (("trajectories", said), ("grades", graded)):
                write_json(self.path / directory / f"{record.rollout_id}.json", data)
            with self._lock:
                self._append(self._predictions, prediction)
                self._append(self._results, record.to_json())
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
        """Idempotent. A directory that this made and that got no result is taken away again."""
        for file in (self._results, self._predictions, self._log):
            if file is not None:
                file.close()
        if self._log is not None:
            logging.getLogger().removeHandler(self._log)
        results = self.path / "results.jsonl"
        if self._new and results.exists() and not results.stat().st_size:
            shutil.rmtree(self.path, ignore_errors=True)


def grade_json(record: RolloutRecord, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a `grades/ID.json` holds. report: `TestReport.to_json()`, None when nothing was graded."""
    return {**record.to_json(), "report": None if report is None else dict(report)}


def write_json(path: Path, data: Any) -> None:
    """One JSON document, whole or not at all; its directory is made. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(data, indent=1, default=str))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def check_unused(path: Path) -> None:
    """Raises `InputError` where another run's results lie, or what cannot be a directory of ours."""
    try:
        used = (path / "results.jsonl").exists()
    except OSError as error:
        raise MachineError(
            f"the run directory {path} cannot be read: {error.strerror}", hint="name another: out=DIR"
        ) from error
    if used:
        raise InputError(
            f"the run directory {path} holds the results of another run",
            hint="name another: out=DIR, or remove it",
        )


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False)
