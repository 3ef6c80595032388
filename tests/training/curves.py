"""The CPU recipe run as a user runs it, and its curves: `scripts/curves`, and the tests of `test_cpu.py`.

    scripts/curves [--seeds 1,2,3] [--steps 40] [--version 0.4.0] [--out runs/curves] [--docs]

A run for each seed and one with shuffled rewards, one after the other; a line per run on stdout, and `curves.json`,
`curves.png` in the run directory. --docs: the figure goes to docs/ too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.skyrl.environment import VERSION, trainer_python
from tests.support import REPOSITORY

CONTROL = "skyrl_minisandbox.training.cpu.ShuffledExperiment"

CHANCE = 0.25
"""Of a random choice: four commands, of which one is right."""

LEARNED = 0.9
LAST = 5
"""Steps at the end that are averaged."""


class CpuTraining:
    """The toy set's image and data below `path`, and trainings on them.

    validated: run `minisandbox validate` first, as a user does; it takes a minute.
    """

    def __init__(self, path: Path, version: str = VERSION, *, validated: bool = False) -> None:
        self.path = path
        self._python = str(trainer_python(version))
        # Ray's sockets need a short path (own_ray.py).
        self._ray = Path(tempfile.mkdtemp(prefix="tests-ray-", dir="/tmp"))
        self._places = [f"images.store={path}/store", f"images.cache={path}/cache"]
        try:
            self._prepare(validated)
        except BaseException:
            self.close()
            raise

    def _prepare(self, validated: bool) -> None:
        path = self.path
        self._command("image", "build", "tasks=toy")
        if validated:
            self._command("validate", "tasks=toy", f"out={path}/validation", "cluster=local")
        validation = f"{path}/validation/validation.json" if validated else "none"
        self._command("tasks", "export", "tasks=toy", f"out={path}/data", f"validation={validation}", "val_fraction=0")

    def train(self, out: Path, *keys: str, limit: float = 1200.0) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`. Raises `AssertionError` with the end of the log when it fails.

        keys: over the recipe's. limit: seconds.
        """
        self._command(
            "train",
            "experiment=cpu",
            f"out={out}",
            f"data.train_data=[{self.path}/data/train.parquet]",
            *keys,
            limit=limit,
        )
        return [json.loads(line) for line in (out / "exports" / "metrics.jsonl").read_text().splitlines()]

    def close(self) -> None:
        shutil.rmtree(self._ray, ignore_errors=True)

    def _command(self, *arguments: str, limit: float = 600.0) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_ADDRESS": "local",  # never another's
            "RAY_TMPDIR": str(self._ray),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(
            [self._python, "-m", "skyrl_minisandbox.cli.main", *arguments, *self._places],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        assert done.returncode == 0, f"minisandbox {arguments[0]}: exit code {done.returncode}\n{output[-6000:]}"


def rewards(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Mean reward of each step."""
    return [line["reward/avg_raw_reward"] for line in lines]


def last(lines: Sequence[dict[str, Any]]) -> float:
    """Mean reward of the last steps."""
    values = rewards(lines)[-LAST:]
    return sum(values) / len(values)


def draw(curves: dict[str, list[float]], file: Path, rollouts: int) -> None:
    """A line per run. rollouts: of one step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for name, values in curves.items():
        control = name.startswith("shuffled")
        axes.plot(
            range(1, len(values) + 1),
            values,
            label=name,
            color="0.55" if control else None,
            linestyle="--" if control else "-",
            linewidth=1.6,
        )
    axes.axhline(CHANCE, color="0.8", linewidth=1, zorder=0)
    axes.text(0.5, CHANCE + 0.012, "chance", color="0.5", fontsize=8)
    axes.set(ylim=(0, 1.02), xlim=(0, None), xlabel=f"training step ({rollouts} rollouts each)", ylabel="mean reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--version", default=VERSION, help="of SkyRL")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--docs", action="store_true", help="write docs/cpu-curves.png, too")
    given = parser.parse_args()
    out = given.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    training = CpuTraining(out, given.version, validated=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    runs = [(f"seed {seed}", seed, []) for seed in seeds] + [("shuffled rewards", seeds[0], [f"mode={CONTROL}"])]
    curves: dict[str, list[float]] = {}
    try:
        for name, seed, more in runs:
            started = time.monotonic()
            where = out / name.replace(" ", "-")
            lines = training.train(
                where, f"seed={seed}", f"trainer.max_training_steps={given.steps}", *more, limit=7200
            )
            curves[name] = rewards(lines)
            there = next((line for line in lines if line["reward/avg_raw_reward"] >= LEARNED), None)
            facts = {
                "run": name,
                "first": curves[name][0],
                "last": round(last(lines), 4),
                "seconds": round(time.monotonic() - started, 1),
                "seconds_to_0.9": there["seconds"] if there else None,
                "step_of_0.9": there["step"] if there else None,
                "logprob_difference_max": max(line["policy/rollout_train_logprobs_abs_diff_max"] for line in lines),
                "masked_max": max(line["minisandbox/masked_mean"] for line in lines),
            }
            print(json.dumps(facts), flush=True)
            (out / "curves.json").write_text(json.dumps(curves))
    finally:
        training.close()
    rollouts = int(lines[0]["generate/batch_num_seq"])
    draw(curves, out / "curves.png", rollouts)
    if given.docs:
        shutil.copy(out / "curves.png", REPOSITORY / "docs" / "cpu-curves.png")
    print(f"run directory: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
