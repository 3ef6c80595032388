"""Calls of `MiniSandboxGenerator` with real rollouts; run as a process, because torch may have to be stubbed.

stdin: JSON with `path` (SkyRL's directory; "" where it is installed) and `calls`, each of which has

    env         our config                      rows      see below
    phase       `train` or `eval`               options   of SkyRL's GeneratorConfig
    named       give trajectory ids (true)      cancel    cancel `generate` after so many seconds
    together    so many of it at the same time (1); the last one's output is given
    again       call `generate` a second time, in an event loop of its own
    margin      seconds that the driver adds to deadlines (60)

A row has `task`, `group`, and `tries`: for each try of it, its answers. An answer is a text, or `{"do": WORD}`:
`raise`, `hang`, `kill` (every worker process of the node, then answer `submit`), `empty`, `few_logprobs`,
`no_logprobs`, `wrong`.
A row with `plain` is of another Env, which ends at its first step, or raises there when `plain` is `raise`.

stdout: JSON of a list with what each call put out, or `{"error": class, "message": …}`. Where torch is real, that has
been through SkyRL's own checks, and `trainer` has what its functions made of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import os
import signal
import sys
import time
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv

from tests.skyrl.chatml import END, START, ChatML


class Templated(ChatML):
    """Also with a template that is handed in, of which it knows only that answers are marked in it."""

    def apply_chat_template(self, conversation: Any, *, return_assistant_tokens_mask: bool = False, **more: Any) -> Any:
        if not return_assistant_tokens_mask:
            return super().apply_chat_template(conversation, **more)
        ids: list[int] = []
        masks: list[int] = []
        for message in conversation:
            whole = self.encode(f"{START}{message['role']}\n{message['content']}{END}\n")
            head = len(self.encode(f"{START}{message['role']}\n"))
            answer = message["role"] == "assistant"
            ids += whole
            masks += [int(answer and head <= place < len(whole) - 1) for place in range(len(whole))]
        return {"input_ids": ids, "assistant_masks": masks}


class Engine:
    """Answers each session from its row; a retry of a row is the same session again."""

    weight_version = 0

    def __init__(self, tokenizer: Any, tries: dict[str, list[list[Any]]], config: Any) -> None:
        self._tokenizer = tokenizer
        self._tries = tries
        self._config = config
        self._at = dict.fromkeys(tries, (0, 0))
        self.asked = dict.fromkeys(tries, 0)
        self.open: set[str] = set()
        self.most_open = 0

    async def generate(self, engine_input: Any, model: str | None = None) -> dict[str, Any]:
        (session,) = engine_input["session_ids"]
        name = session if session in self._tries else next(iter(self._tries))  # SkyRL's own names are random
        attempt, turn = self._at[name]
        self._at[name] = (attempt, turn + 1)
        self.asked[name] += 1
        self.open.add(session)
        self.most_open = max(self.most_open, len(self.open))
        await asyncio.sleep(0)
        tries = self._tries[name]
        answers = tries[min(attempt, len(tries) - 1)]
        answer = answers[min(turn, len(answers) - 1)]
        word = answer["do"] if isinstance(answer, dict) else ""
        if word == "raise":
            raise ConnectionError("the engine is gone")
        if word == "hang":
            await asyncio.sleep(3600)
        if word == "kill":
            await asyncio.get_running_loop().run_in_executor(None, kill_workers, self._config)
        text = ("submit" if word else answer) + self._tokenizer.eos_token
        tokens: Any = self._tokenizer.encode(text)
        logprobs: Any = [-0.5] * len(tokens)
        if word == "empty":
            tokens, logprobs = [], []
        if word == "few_logprobs":
            logprobs = logprobs[:-1]
        if word == "no_logprobs":
            logprobs = None
        if word == "wrong":
            tokens = None
        return {
            "responses": [text],
            "response_ids": [tokens],
            "stop_reasons": ["stop"],
            "response_logprobs": [logprobs] if self._config["logprobs"] and logprobs is not None else None,
            "prompt_logprobs": None,
            "rollout_expert_indices": None,
            "rollout_sample_support": None,
        }

    async def finish_session(self, session: str) -> None:
        self.open.discard(session)
        if session in self._at:
            self._at[session] = (self._at[session][0] + 1, 0)


def kill_workers(config: Any) -> None:
    from skyrl_minisandbox.env import shared_cluster

    for status in shared_cluster(config["env"]).status():
        for pid in status.pids:
            os.kill(pid, signal.SIGKILL)


def call(given: dict[str, Any]) -> dict[str, Any]:
    import skyrl_gym
    from skyrl.train.config import ChatTemplateConfig, GeneratorConfig, SamplingParams
    from skyrl.train.generators.base import BatchMetadata, TrajectoryID

    from skyrl_minisandbox import placement
    from skyrl_minisandbox.config import make_config
    from skyrl_minisandbox.env import shared_cluster
    from skyrl_minisandbox.errors import MiniSandboxError
    from skyrl_minisandbox.training.config import GymConfig
    from skyrl_minisandbox.training.generator import MiniSandboxGenerator

    if "plain" not in skyrl_gym.registry:
        skyrl_gym.register(id="plain", entry_point="tests.training.generated:Plain")
    placement.MARGIN = given.get("margin", 60.0)
    config = make_config(given["env"])
    rows = given["rows"]
    tokenizer = Templated()
    seen: dict[str, int] = {}
    names = []
    for row in rows:
        names.append(TrajectoryID(row["group"], seen.setdefault(row["group"], 0)))
        seen[row["group"]] += 1
    others = [  # of the same rows, at the same time, under other names
        [TrajectoryID(f"{name.instance_id} {number}", name.repetition_id) for name in names]
        for number in range(given.get("together", 1) - 1)
    ]
    tries = {name.to_string(): row["tries"] for each in [names, *others] for name, row in zip(each, rows, strict=True)}
    options = {
        "max_turns": 8,
        "batched": False,
        "max_input_length": 100_000,
        "sampling_params": SamplingParams(max_generate_length=1000, logprobs=given.get("logprobs", 1)),
        **given.get("options", {}),
    }
    if "chat_template" in options:
        options["chat_template"] = ChatTemplateConfig(**options["chat_template"])
    engine = Engine(tokenizer, tries, {"env": config, "logprobs": given.get("logprobs", 1) is not None})
    generator = MiniSandboxGenerator(
        GeneratorConfig(**options),
        GymConfig(max_env_workers=given.get("max_env_workers", 2), minisandbox=config),
        engine,
        tokenizer,
    )
    extras = [{"task": row["task"], "data_source": "toy", "plain": row.get("plain", "")} for row in rows]
    before = copy.deepcopy(extras)
    batch = {
        "prompts": [[{"role": "user", "content": "the row's prompt"}] for _ in rows],
        "env_classes": ["plain" if row.get("plain") else "minisandbox" for row in rows],
        "env_extras": extras,
        "sampling_params": None,
        "trajectory_ids": names if given.get("named", True) else None,
        "batch_metadata": BatchMetadata(global_step=0, training_phase=given.get("phase", "train")),
    }

    async def run() -> Any:
        batches = [*({**batch, "trajectory_ids": each} for each in others), batch]
        calls = [asyncio.ensure_future(generator.generate(each)) for each in batches]
        if "cancel" in given:
            await asyncio.sleep(given["cancel"])
            calls[-1].cancel()
        return (await asyncio.gather(*calls))[-1]

    started = time.monotonic()
    try:
        for _ in range(1 + given.get("again", False)):
            out = asyncio.run(run())
    except (MiniSandboxError, ArithmeticError) as error:
        out = {"error": type(error).__name__, "message": str(error)}
    except asyncio.CancelledError:
        out = {"error": "CancelledError"}
    told: dict[str, Any] = {
        "seconds": time.monotonic() - started,
        "open": sum(status.open for status in shared_cluster(config).status()),
        "asked": engine.asked,
        "sessions": sorted(engine.open),
        "most_open": engine.most_open,
        "extras_untouched": [{**each, "max_turns": None} for each in extras]
        == [{**each, "max_turns": None} for each in before],
    }
    if "error" in out:
        return {**told, **out}
    return {
        **told,
        "trainer": None if given["stubbed"] else trainer(given, out, [name.instance_id for name in names], options),
        "texts": [tokenizer.decode(ids) for ids in out["response_ids"]],
        "response_ids": out["response_ids"],
        "rewards": out["rewards"],
        "loss_masks": out["loss_masks"],
        "stop_reasons": out["stop_reasons"],
        "logprobs": out["rollout_logprobs"],
        "last": out["is_last_step"],
        "owners": [name.to_string() for name in out["trajectory_ids"] or []],
        "metrics": {key: float(value) for key, value in out["rollout_metrics"].items()},
    }


def trainer(given: dict[str, Any], out: Any, uids: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """What SkyRL's trainer does with an output; it raises where that cannot be."""
    from skyrl.train.generators.utils import concatenate_generator_outputs, merge_stepwise_output
    from skyrl.train.utils.trainer_utils import handle_dynamic_sampling, validate_generator_output, zero_variance_filter

    step_wise = options.get("step_wise_trajectories", False)
    validate_generator_output(len(given["rows"]), out, step_wise=step_wise)
    other = copy.deepcopy(out)
    for name in {id(name): name for name in other["trajectory_ids"] or []}.values():
        name.instance_id += " again"
    twice = concatenate_generator_outputs([copy.deepcopy(out), other], step_wise=step_wise)
    told = {"twice": {key: float(value) for key, value in twice["rollout_metrics"].items() if "/" in key}}
    if step_wise:
        told["merged"] = len(merge_stepwise_output(copy.deepcopy(out))["response_ids"])
        uids = [name.instance_id for name in out["trajectory_ids"]]
    wanted = {"type": "filter", "train_batch_size": 1000, "n_samples_per_prompt": 2}
    state: Any = {"sample_batch_count": 1}
    with contextlib.suppress(AssertionError):  # of 0.4.0, where no group is left: "indices must be non-empty"
        handle_dynamic_sampling(copy.deepcopy(out), uids, wanted, state)
    told["sampled"] = sorted(set(state.get("collected_uids", ())))
    rewards = [sum(reward) if isinstance(reward, list) else reward for reward in out["rewards"]]
    kept = zero_variance_filter(rewards, uids, loss_masks=out["loss_masks"])
    told["varied"] = sorted({uids[number] for number in kept if any(out["loss_masks"][number])})
    return told


class Plain(BaseTextEnv):  # type: ignore[misc]
    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        super().__init__()
        self._raises = extras["plain"] == "raise"

    def step(self, action: str) -> Any:
        if self._raises:
            time.sleep(1)  # the others are under way
            raise ArithmeticError("another Env's fault")
        return {"observations": [], "reward": 0.25, "done": True, "metadata": {}}


def main() -> None:
    request = json.load(sys.stdin)
    if request["path"]:
        from tests.skyrl.episodes import find_skyrl

        find_skyrl(request["path"])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    from skyrl_minisandbox.env import shutdown

    try:
        answers = [call({**each, "stubbed": bool(request["path"])}) for each in request["calls"]]
    finally:
        shutdown()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
