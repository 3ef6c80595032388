"""An experiment that trains nothing and writes down what it was given."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from skyrl_minisandbox.training.experiment import Experiment


class Telling(Experiment):
    """`trainer.run_name` tells it what to do: `fail…` raises, `wait…` waits to be interrupted."""

    def __init__(self, cfg: Any) -> None:  # the real one loads a tokenizer and the data
        self.cfg = cfg

    def work(self) -> None:
        trainer, out = self.cfg.trainer, Path(self.cfg.ours.out)
        told = {"seed": trainer.seed, "run_name": trainer.run_name, "ckpt_path": trainer.ckpt_path}
        told |= {"retries": self.cfg.ours.training.retries, "pid": os.getpid()}
        out.mkdir(parents=True, exist_ok=True)
        (out / ".told").write_text(json.dumps(told))
        (out / ".told").rename(out / "told.json")
        if trainer.run_name.startswith("fail"):
            raise RuntimeError("this job was told to fail")
        while trainer.run_name.startswith("wait"):
            time.sleep(0.1)
