"""A whole job as a user starts it: SkyRL's command, its own Ray, our Env; only the engine is a server with a list."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tests.machine import Process, descendants
from tests.skyrl.environment import trainer_python
from tests.small import SOLVE, build_small_image, small_task
from tests.support import REPOSITORY, seconds

OURS = "environment.skyrl_gym.minisandbox"

ROWS = 4

SIMULATION = [
    "trainer.fully_async.enabled=true",
    "trainer.fully_async.simulate_training=true",
    "trainer.fully_async.simulate_training_step_seconds=0.1",
    "trainer.fully_async.max_staleness_steps=1",
    "trainer.fully_async.num_parallel_generation_workers=2",
    "trainer.algorithm.policy_loss_type=rollout_is",
]
"""SkyRL's trainer without a model: `tests.training.sim` runs it where no GPU is."""


class Bench:
    """A model directory, a store with the small tasks' image, data, and an engine. One per SkyRL version."""

    def __init__(self, version: str, path: Path) -> None:
        self.path = path
        self.python = str(trainer_python(version))
        # Ray's sockets need a short path (own_ray.py).
        self.ray = Path(tempfile.mkdtemp(prefix="tests-ray-", dir="/tmp"))
        build_small_image(path / "store", path / "cache")
        imports = "import sys; from pathlib import Path; from skyrl_minisandbox.training.cpu_model import write_model"
        write = f"{imports}; write_model(Path(sys.argv[1]), seed=0)"
        subprocess.run([self.python, "-c", write, str(path / "model")], check=True)
        tasks = [small_task(f"small-{n}") for n in range(ROWS)]
        rows = [
            {
                "prompt": [{"role": "user", "content": task.problem_statement}],
                "data_source": "small",
                "task": task.model_dump_json(),
            }
            for task in tasks
        ]
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        shutil.rmtree(self.ray, ignore_errors=True)

    @contextlib.contextmanager
    def engine(self, answers: Sequence[str] = (SOLVE, "submit")) -> Iterator[str]:
        """Its address."""
        address = self.path / f"address-{time.monotonic_ns()}"
        command = [self.python, "-m", "tests.training.server", str(self.path / "model"), str(address)]
        process = subprocess.Popen([*command, json.dumps(list(answers))], cwd=REPOSITORY)
        try:
            deadline = time.monotonic() + seconds(120)
            while not address.exists():
                assert process.poll() is None and time.monotonic() < deadline, "no engine came up"
                time.sleep(0.05)
            yield address.read_text()
        finally:
            process.kill()
            process.wait()

    def keys(self, engine: str, *more: str) -> list[str]:
        """What a job without GPUs needs."""
        path = self.path
        return [
            f"data.train_data=['{path}/rows.jsonl']",
            f"data.val_data=['{path}/rows.jsonl']",
            "data.dataloader.num_workers=0",
            f"trainer.policy.model.path={path}/model",
            "trainer.placement.colocate_all=false",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=2",
            "trainer.micro_train_batch_size_per_gpu=1",
            "trainer.micro_forward_batch_size_per_gpu=1",
            "trainer.algorithm.use_kl_loss=false",
            "trainer.epochs=1",
            "trainer.eval_interval=-1",
            "trainer.eval_before_train=false",
            "trainer.ckpt_interval=-1",
            "trainer.hf_save_interval=-1",
            "trainer.resume_mode=none",
            "trainer.logger=console",
            "trainer.max_prompt_length=1500",
            f"trainer.export_path={path}/export",
            f"trainer.ckpt_path={path}/checkpoints",
            f"trainer.log_path={path}/log",
            "generator.max_input_length=1500",
            "generator.max_turns=5",
            "generator.batched=false",
            "generator.n_samples_per_prompt=2",
            "generator.sampling_params.max_generate_length=64",
            "generator.sampling_params.logprobs=1",
            "generator.inference_engine.run_engines_locally=false",
            "generator.inference_engine.enable_ray_prometheus_stats=false",
            f"generator.inference_engine.external_proxy_url={engine}",
            f"generator.inference_engine.external_server_urls=['{engine}']",
            f"{OURS}.images.store={path}/store",
            f"{OURS}.images.cache={path}/cache",
            f"{OURS}.scaffold=tests.small.Loop",
            *more,
        ]

    def start(self, engine: str, *more: str, module: str = "tests.training.sim", nohup: bool = False) -> Job:
        """`python -m MODULE KEYS…`, or, for no module, the Python code that `more` begins with.

        nohup: it and all that it starts ignore SIGINT, as below `nohup` or behind a shell's `&`. Otherwise they do not,
            even where these tests run so.
        """
        handler = signal.SIG_IGN if nohup else signal.SIG_DFL
        log = tempfile.TemporaryFile()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_ADDRESS": "local",  # never another's
            "RAY_TMPDIR": str(self.ray),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(REPOSITORY),
        }
        first, keys = (["-m", module], more) if module else (["-c", more[0]], more[1:])
        process = subprocess.Popen(
            [self.python, *first, *self.keys(engine, *keys)],
            cwd=self.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        )
        return Job(process, log)


class Job:
    """A started job."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.process = process
        self._log = log

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait(self, limit: float = 300.0) -> int:
        """Its exit code. Raises `AssertionError` with the end of its log when it does not come."""
        try:
            return self.process.wait(seconds(limit))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job does not end\n{self.log()[-6000:]}") from None

    def until(self, command: str, limit: float = 300.0) -> None:
        """Wait for a process of this command in a sandbox of the job."""
        deadline = time.monotonic() + seconds(limit)
        while command not in {process.command for process in self.processes()}:
            alive = self.process.poll() is None and time.monotonic() < deadline
            assert alive, f"no `{command}` came up\n{self.log()[-6000:]}"
            time.sleep(0.2)

    def processes(self) -> list[Process]:
        """Ray's, and all that runs in them."""
        return descendants(self.process.pid)

    def kill(self) -> None:
        """It and all below it."""
        for process in [*self.processes(), Process(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait()


def gone(processes: Sequence[Process], limit: float = 60.0) -> list[str]:
    """Those that still live after at most so many seconds."""
    deadline = time.monotonic() + seconds(limit)
    left = list(processes)
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [process for process in left if _lives(process)]
    return [str(process) for process in left]


def _lives(process: Process) -> bool:
    try:
        now = Process(process.pid)
    except (OSError, IndexError):
        return False
    return now.started == process.started and now.state not in "ZX"
