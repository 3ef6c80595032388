"""Rollouts through our generator, beside what the engine sent and what the scaffold received.

Run in a process with SkyRL's trainer. Nothing is judged here: test_tokens.py does.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.skyrl.engine import ScriptedEngine
from tests.skyrl.tokenizers import END, make_test_tokenizer
from tests.small import SOLVE, small_task
from tests.training.faults import make_batch, make_generator

ANSWERS = {
    "0_0": ["<think>What is in it?</think>\ncat answer.sh", f"<think>Mend it.</think>\n{SOLVE}", "submit"],
    "0_1": ["<think>Nothing to do.</think>\ntrue", "submit"],
    "1_0": ["ls", "printf 'a\\tb <|im_start|> é 漢\\n'", SOLVE, "<think>Done</think>\ncat answer.sh", "submit"],
    "1_1": [SOLVE, "submit"],
    "2_0": ["submit"],
    "2_1": ["true", "true", "true", "true", "true", "never given"],  # the turn limit
}
"""By session. Groups: 0 has both rewards, 1 only one, 2 none."""

TURNS = 5


def run(
    *, template: str, step_wise: bool, canonical: bool, env: dict[str, Any], out: str, broken: bool = False
) -> dict[str, Any]:
    """What the generator put out, and beside it the engine's and the scaffold's side, by session.

    canonical: the engine's tokens are those that the tokenizer would make. broken: a row of group 1 cannot be run.
    """
    from skyrl_minisandbox.config import make_config
    from skyrl_minisandbox.env import shutdown

    config = make_config(
        {
            **env,
            "scaffold": "tests.training.reasoning.Reasoning",
            "cluster": {"kind": "local", "workers": 1, "slots": 8},
            "training": {"retries": 0, "max_infra_error_fraction": 1.0},
            "out": out,
        }
    )
    try:
        return asyncio.run(_run(config, template, step_wise, canonical, broken))
    finally:
        shutdown()


async def _run(config: Any, template: str, step_wise: bool, canonical: bool, broken: bool) -> dict[str, Any]:
    from skyrl.train.generators.utils import merge_stepwise_output
    from skyrl.train.utils.trainer_utils import validate_generator_output

    tokenizer = make_test_tokenizer(template)
    engine = ScriptedEngine(tokenizer, ANSWERS, canonical=canonical)
    generator = make_generator(config, engine, tokenizer, max_turns=TURNS, step_wise_trajectories=step_wise)
    received: dict[str, list[dict[str, str]]] = {}
    _listen(received)
    sessions = list(ANSWERS)
    extras = [{"task": small_task(f"task-{session}").model_dump_json()} for session in sessions]
    if broken:
        extras[sessions.index("1_0")] = {"task": "{}"}
    out = await generator.generate(make_batch(sessions, extras), disable_tqdm=True)
    validate_generator_output(len(sessions), out, step_wise)
    found: dict[str, Any] = {
        "rows": _rows(out, sessions, tokenizer, step_wise),
        "filtered": _filtered(out, sessions, step_wise),
        "replaced": _replaced(out, sessions, step_wise),
        "sessions": {session: _session(session, engine, received, tokenizer) for session in received},
    }
    if step_wise:
        found["merged"] = _rows(merge_stepwise_output(out), sessions, tokenizer, step_wise)
    return found


def _listen(received: dict[str, list[dict[str, str]]]) -> None:
    """Keep the conversation that the scaffold had, as its node recorded it."""
    from skyrl_minisandbox.env import MiniSandboxEnv

    class Listening(MiniSandboxEnv):
        def close(self) -> None:
            super().close()
            if self.finished is not None and self.task is not None and self.finished.trajectory:
                received[self.task.id.removeprefix("task-")] = self.finished.trajectory["messages"]

    import skyrl_gym
    from skyrl_gym.envs.registration import EnvSpec

    skyrl_gym.registry["minisandbox"] = EnvSpec(id="minisandbox", entry_point=Listening)


def _rows(out: Any, sessions: list[str], tokenizer: Any, step_wise: bool) -> list[dict[str, Any]]:
    names = [each.to_string() for each in out["trajectory_ids"]] if step_wise else sessions
    return [
        {
            "session": name,
            "prompt": out["prompt_token_ids"][number],
            "prompt_text": tokenizer.decode(out["prompt_token_ids"][number]),
            "ids": out["response_ids"][number],
            "mask": out["loss_masks"][number],
            "logprobs": out["rollout_logprobs"][number],
            "reward": out["rewards"][number],
            "last": out["is_last_step"][number] if step_wise else True,
            "parts": _parts(out["response_ids"][number], out["loss_masks"][number], tokenizer),
        }
        for number, name in enumerate(names)
    ]


def _parts(ids: list[int], mask: list[int], tokenizer: Any) -> list[tuple[int, str]]:
    """The response as texts, cut where the mask changes."""
    parts: list[tuple[int, list[int]]] = []
    for token, one in zip(ids, mask, strict=True):
        if not parts or parts[-1][0] != one:
            parts.append((one, []))
        parts[-1][1].append(token)
    return [(one, tokenizer.decode(part)) for one, part in parts]


def _session(session: str, engine: ScriptedEngine, received: Any, tokenizer: Any) -> dict[str, Any]:
    messages = received[session]
    turns = []
    place = 0
    for sent in engine.last(session):
        place = next(number for number in range(place, len(messages)) if messages[number]["role"] == "assistant") + 1
        before = tokenizer.apply_chat_template(messages[: place - 1], add_generation_prompt=True, tokenize=False)
        again = tokenizer.encode(tokenizer.decode(sent.ids), add_special_tokens=False)
        turns.append(
            {
                "prompt": sent.prompt,
                "ids": sent.ids,
                "logprobs": sent.logprobs,
                "rendered": before,
                "encoded_again": again,
            }
        )
    return {"messages": messages, "turns": turns, "end": END}


def _sampling(kind: str, sessions: list[str]) -> dict[str, Any]:
    return {
        "type": kind,
        "max_sample_batches": 1,
        "min_replace_ratio": 0.2,
        "train_batch_size": len({session.split("_")[0] for session in sessions}),
        "n_samples_per_prompt": 2,
    }


def _sampled(kind: str, out: Any, sessions: list[str], step_wise: bool) -> list[tuple[str, float, list[int]]]:
    """SkyRL's dynamic sampling over the batch: each row's group, reward and tokens."""
    from skyrl.train.utils.trainer_utils import handle_dynamic_sampling

    groups = (
        [each.instance_id for each in out["trajectory_ids"]]
        if step_wise
        else [session.split("_")[0] for session in sessions]
    )
    state: Any = {"sample_batch_count": 1}
    kept, uids, _, state = handle_dynamic_sampling(out, groups, _sampling(kind, sessions), state)
    if kind == "filter" and state and state.get("collected_generator_output"):
        kept, uids = state["collected_generator_output"], state["collected_uids"]
    return [
        (uid, float(sum(reward)), ids)
        for uid, reward, ids in zip(uids, kept["rewards"], kept["response_ids"], strict=True)
    ]


def _filtered(out: Any, sessions: list[str], step_wise: bool) -> Any:
    return _sampled("filter", out, sessions, step_wise)


def _replaced(out: Any, sessions: list[str], step_wise: bool) -> Any:
    return None if step_wise else _sampled("replace", out, sessions, step_wise)
