"""SkyRL's own training on two CPU cores: `minisandbox train experiment=cpu`.

The trainer, its data, advantages, losses and metrics are SkyRL's; the Env, its sandboxes and rewards are ours and
real. Only what needs a GPU is put in its place, by hooks that SkyRL has for it: the model's workers by
`LocalDispatch`, which runs the model in the trainer's process, and vLLM by `CpuEngine`. It is for tests and for
looking at how a training goes, with a model of `cpu_model.py`; nothing here is made for speed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import ray
import torch
from skyrl.backends.skyrl_train.distributed.dispatch import WorkerOutput
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from skyrl.train.dataset import PromptDataset
from skyrl.train.utils.callbacks import TrainingCallback
from transformers import PreTrainedModel, get_scheduler

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.training.cpu_engine import CpuEngine
from skyrl_minisandbox.training.cpu_model import load_model, write_model
from skyrl_minisandbox.training.experiment import Experiment

Batch = Any  # SkyRL's TrainingInputBatch


class LocalDispatch:
    """What SkyRL's trainer asks of `WorkerDispatch`, for a policy in this process. No critic, no reference model.

    engine: gets the weights after each step. steps: optimizer steps of the whole training, for the schedule.
    """

    def __init__(self, cfg: Any, model: PreTrainedModel, engine: CpuEngine, *, steps: int | None) -> None:
        self._cfg = cfg.trainer
        self._engine = engine
        self._model = model.train()
        self._loss = PolicyLossRegistry.get(self._cfg.algorithm.policy_loss_type)
        wanted = self._cfg.policy.optimizer_config
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=wanted.lr, betas=tuple(wanted.adam_betas), weight_decay=wanted.weight_decay
        )
        self._schedule = get_scheduler(
            wanted.scheduler,
            optimizer=self._optimizer,
            num_warmup_steps=wanted.num_warmup_steps,
            num_training_steps=steps,
        )

    # -- forward and backward -----------------------------------------------------------------------

    def stage_data(self, model: str, data: Batch, mini_batch_boundaries: list[tuple[int, int]]) -> list[Batch]:
        """The mini-batches; there is no other process to bring them to."""
        return [data[start:end] for start, end in mini_batch_boundaries]

    def forward(self, model: str, data: Batch, **_: Any) -> WorkerOutput:
        """Log-probabilities of the response tokens, a row of `response_length` per sample."""
        rows: list[dict[str, list[float]]] = []
        with torch.no_grad():
            for part in _parts(data, self._cfg.micro_forward_batch_size_per_gpu):
                logprobs, _entropy = self._score(part)
                rows += [{"logprobs": row} for row in logprobs.tolist()]
        return WorkerOutput(loss_fn_outputs=rows)

    forward_from_staged = forward

    def forward_backward(self, model: str, data: Batch, **_: Any) -> WorkerOutput:
        """Add the gradients of one mini-batch. SkyRL scales its advantages so that the parts' losses add up."""
        algorithm = self._cfg.algorithm
        total: dict[str, float] = {}
        for part in _parts(data, self._cfg.micro_train_batch_size_per_gpu):
            share = len(part["sequences"]) / len(data["sequences"])
            logprobs, entropies = self._score(part)
            mask = part["loss_mask"]
            loss, metrics = self._loss(
                logprobs,
                part["action_log_probs"],
                part["advantages"],
                config=algorithm,
                loss_mask=mask,
                rollout_logprobs=part.get("rollout_logprobs"),
            )
            entropy = (entropies * mask).sum() / mask.sum().clamp(min=1)
            whole = loss
            if algorithm.use_entropy_loss:
                whole = loss - algorithm.entropy_loss_coef * entropy * share
            whole.backward()
            told = {"policy_entropy": entropy * share, "policy_loss": loss, "final_loss": whole}
            found = {name: float(value.detach()) for name, value in told.items()}
            found |= {f"loss_metrics/{name}": float(value) * share for name, value in metrics.items()}
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        total["policy_lr"] = self._schedule.get_last_lr()[0]
        return WorkerOutput(metrics=total)

    forward_backward_from_staged = forward_backward

    def optim_step(self, model: str) -> float:
        """One step of AdamW. Returns the norm of the gradients before it is clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._cfg.policy.optimizer_config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        return float(norm)

    def _score(self, data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each response token and the entropy there; both [samples, response_length].

        SkyRL pads on the left, so the responses are the last tokens of all rows.
        """
        length = data.metadata["response_length"]
        mask = data["attention_mask"]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        out = self._model(
            data["sequences"], attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=length + 1
        )
        every = (out.logits[:, :-1] / self._cfg.algorithm.temperature).log_softmax(-1)
        chosen = every.gather(-1, data["sequences"][:, -length:, None]).squeeze(-1)
        return chosen, -(every.exp() * every).sum(-1)

    # -- weights ------------------------------------------------------------------------------------

    def init_weight_sync_state(self, inference_engine_client: CpuEngine) -> None:
        """One process: nothing to connect."""

    async def save_weights_for_sampler(self, model_id: str | None = None) -> None:
        """Copy the weights to the engine."""
        self._engine.load(self._model.state_dict())

    def save_checkpoint(self, model: str, ckpt_dir: str, tokenizer: Any = None, **_: Any) -> None:
        """Weights, optimizer, schedule and the engine's version, by which it samples, in one file."""
        Path(ckpt_dir).mkdir(parents=True, exist_ok=True)
        parts = {"model": self._model, "optimizer": self._optimizer, "schedule": self._schedule}
        saved: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        torch.save(saved | {"version": self._engine.weight_version}, Path(ckpt_dir) / "policy.pt")

    def load_checkpoint(self, model: str, ckpt_dir: str, **_: Any) -> None:
        """Go on from what `save_checkpoint` wrote."""
        saved = torch.load(Path(ckpt_dir) / "policy.pt", weights_only=True)
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        self._engine.weight_version = saved["version"]

    def save_hf_model(self, model: str, export_dir: str, tokenizer: Any) -> None:
        """A checkpoint that transformers reads."""
        self._model.save_pretrained(export_dir)
        tokenizer.save_pretrained(export_dir)

    # -- what is about many workers -----------------------------------------------------------------

    def get_lcm_dp_size(self) -> int:
        """One worker, so that any number of samples will do."""
        return 1

    def get_node_ids(self) -> list[str]:
        """The Ray node of this process, which holds the checkpoints."""
        return [ray.get_runtime_context().get_node_id()]

    def get_timing_metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def empty_cache(self, model: str | None = None) -> None:
        """No accelerator."""

    def finalize_pending_saves(self, model: str) -> None:
        """`save_checkpoint` has written everything when it returns."""


class MetricsFile(TrainingCallback):  # type: ignore[misc]  # SkyRL has no type information
    """A line of JSON per step: `step`, `seconds` since the start, all that SkyRL's tracker gets, `rollouts`.

    rollouts: digest of the step's tokens, masks and advantages: equal digests are equal rollouts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.monotonic()
        self._rollouts = ""

    def on_train_start(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Begin the file, unless a checkpoint is gone on from."""
        if callback_input.global_step == 0:
            self._path.unlink(missing_ok=True)

    def on_step_end(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Remember what was trained on."""
        digest = hashlib.sha256()
        for name in ("sequences", "attention_mask", "loss_mask", "advantages"):
            digest.update(callback_input.batch[name].numpy().tobytes())
        self._rollouts = digest.hexdigest()

    def on_log(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Write the line."""
        known = {"step": callback_input.global_step, "seconds": round(time.monotonic() - self._start, 2)}
        line = known | {"rollouts": self._rollouts} | dict(callback_input.logs)
        with self._path.open("a") as file:
            file.write(json.dumps(line, default=float) + "\n")


class CpuExperiment(Experiment):
    """Our experiment without a GPU: `mode=skyrl_minisandbox.training.cpu.CpuExperiment`.

    The policy is `trainer.policy.model.path`; where there is nothing, a random model is written there first.
    `metrics.jsonl` below `trainer.export_path` has the curves. Raises `InputError` for what it cannot do.
    """

    def __init__(self, cfg: Any) -> None:
        refuse(cfg)
        directory = Path(cfg.trainer.policy.model.path)
        if not (directory / "config.json").exists():
            write_model(directory, seed=cfg.trainer.seed)
        super().__init__(cfg)

    def get_train_dataset(self) -> Any:
        """SkyRL's dataset, filtered in this process: eight processes for a few rows take most of a minute."""
        return self._dataset(self.cfg.data.train_data)

    def get_eval_dataset(self) -> Any:
        """The same for evaluation; None where none is asked for."""
        wanted = self.cfg.trainer.eval_interval > 0 and self.cfg.data.val_data
        return self._dataset(self.cfg.data.val_data) if wanted else None

    def get_inference_client(self) -> CpuEngine:
        """The engine of this process."""
        model = load_model(Path(self.cfg.trainer.policy.model.path))
        return CpuEngine(model, self.tokenizer, seed=self.cfg.trainer.seed)

    def _dataset(self, files: list[str]) -> Any:
        return PromptDataset(
            datasets=files,
            tokenizer=self.tokenizer,
            max_prompt_length=self.cfg.trainer.max_prompt_length,
            num_workers=1,
        )

    def _setup_trainer(self) -> Any:
        """The trainer as SkyRL makes it, with a dispatch of ours instead of actors that hold GPUs."""
        cfg = self.cfg.trainer
        for directory in (cfg.export_path, cfg.ckpt_path):
            os.makedirs(directory, exist_ok=True)
        engine = self.get_inference_client()
        trainer = self.get_trainer(
            cfg=self.cfg,
            tracker=self.get_tracker(),
            tokenizer=self.tokenizer,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            inference_engine_client=engine,
            generator=self.get_generator(self.cfg, self.tokenizer, engine),
            colocate_pg=None,
        )
        steps = trainer.total_training_steps
        if steps is not None:
            steps *= cfg.train_batch_size // cfg.policy_mini_batch_size * cfg.update_epochs_per_batch
        model = load_model(Path(cfg.policy.model.path))
        trainer.dispatch = LocalDispatch(self.cfg, model, engine, steps=steps)
        trainer.add_callback(MetricsFile(Path(cfg.export_path) / "metrics.jsonl"))
        self.trainer = trainer
        return trainer


class ShuffledExperiment(CpuExperiment):
    """The control: the same training, but each batch's rewards are dealt out to its rollouts at random.

    Their mean stays the policy's, so the curves compare; what is left of a rise is not learned from rewards.
    """

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> Any:
        """Ours, with its rewards shuffled."""
        return _Shuffled(super().get_generator(cfg, tokenizer, inference_engine_client), cfg.trainer.seed)


class _Shuffled:
    def __init__(self, generator: Any, seed: int) -> None:
        self._generator = generator
        self._random = random.Random(seed)

    async def generate(self, input_batch: Any, *arguments: Any, **more: Any) -> Any:
        found = await self._generator.generate(input_batch, *arguments, **more)
        totals = [sum(tokens) for tokens in found["rewards"]]
        self._random.shuffle(totals)
        rows = zip(found["rewards"], totals, strict=True)
        found["rewards"] = [[0.0] * (len(tokens) - 1) + [total] for tokens, total in rows]
        return found


def _parts(data: Batch, size: int) -> list[Batch]:
    return [data[start : start + size] for start in range(0, len(data["sequences"]), size)]


def refuse(cfg: Any) -> None:
    """What this module does not do must not look as if it did. Raises `InputError` that names the key."""
    algorithm = cfg.trainer.algorithm
    for key, value, allowed in (
        ("trainer.algorithm.use_kl_loss", algorithm.use_kl_loss, False),
        ("trainer.algorithm.use_kl_in_reward", algorithm.use_kl_in_reward, False),
        ("trainer.critic.model.path", cfg.trainer.critic.model.path, None),
        ("trainer.policy.model.lora.rank", cfg.trainer.policy.model.lora.rank, 0),
        ("trainer.placement.colocate_all", cfg.trainer.placement.colocate_all, False),
        ("generator.inference_engine.enable_ray_prometheus_stats",
         cfg.generator.inference_engine.enable_ray_prometheus_stats, False),
    ):  # fmt: skip
        if value and value != allowed:
            raise InputError(
                f"training on the CPU has no `{key}` (it is {value!r})",
                hint=f"{key}={'null' if allowed is None else str(allowed).lower()}",
            )
