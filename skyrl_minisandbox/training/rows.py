"""What becomes of rows that could not be trained on: their place, their masks, their group, the figures.

Works on the dict that SkyRL's generator gives out, before the trainer sees it. Lists in it have one entry per row,
and in step-wise mode one per turn of each row: `spans` says which entries are whose. A reward is a number, or a list
of one per response token, whichever SkyRL made.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from skyrl_minisandbox.record import EndedBy, Outcome

INFRA_ERROR = "infra_error"
PROMPT_TOO_LONG = "prompt_too_long"
CAUSES = (INFRA_ERROR, PROMPT_TOO_LONG)

GRAIN = 1 << 20
"""A masked group's reward is a whole number of GRAIN-ths: the mean of equal rewards is then exactly that, their spread
exactly 0, and SkyRL's filter, which compares with 0, drops the group."""


@dataclasses.dataclass
class Row:
    """One row of a call, beside what SkyRL keeps of it.

    group: rows of one group are compared with each other. ours: its Env is ours; of the others nothing is touched.
    cause: why it cannot be trained on, one of CAUSES; "" for a live row. masked: kept out of the loss, by us.
    event: of `rewards.fault`, where it failed; node, error: likewise.
    retries: tries after the first. waited: seconds before it was let in and set up.
    """

    group: str
    ours: bool = True
    cause: str = ""
    masked: bool = False
    outcome: Outcome | None = None
    ended_by: EndedBy | None = None
    event: str = ""
    node: str = ""
    error: str = ""
    retries: int = 0
    waited: float = 0.0


def spans(out: dict[str, Any], trajectory_ids: Sequence[Any] | None, count: int) -> list[range]:
    """The entries of each of `count` rows. A row of another Env can have none: SkyRL drops over-long ones."""
    last: list[bool] | None = out.get("is_last_step")
    if last is None:
        return [range(number, number + 1) for number in range(count)]
    assert trajectory_ids is not None  # SkyRL asks for them in step-wise mode
    found: list[range] = []
    start = 0
    for wanted in trajectory_ids:
        stop = start
        if start < len(last) and out["trajectory_ids"][start] == wanted:
            stop = last.index(True, start) + 1
        found.append(range(start, stop))
        start = stop
    return found


def settle(out: dict[str, Any], rows: list[Row], where: list[range], *, policy: str, evaluating: bool) -> Counter[str]:
    """Mask what failed so that nothing else is biased; how many groups were dropped for each cause.

    policy: `mask_group`: the whole group is masked, and all its rewards are the mean of the live ones, so that no
        figure of the batch moves and a filter on variance drops it. `mean`: the failed row alone, its reward likewise.
    evaluating: nobody trains on it; a failed row has the mean of its group's live rows, else of all, and no more.
    """
    dropped: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.group, []).append(number)
    everybody = _live_rewards(out, rows, where, range(len(rows)))
    for members in groups.values():
        failed = [number for number in members if rows[number].cause]
        if not failed:
            continue
        live = _live_rewards(out, rows, where, members)
        if evaluating:
            for number in failed:
                _set_reward(out, where[number], _mean(live or everybody))
        elif policy == "mean" and live:
            for number in failed:
                _mask(out, rows[number], where[number])
                _set_reward(out, where[number], _mean(live))
        else:
            causes = {rows[number].cause for number in failed}
            dropped[INFRA_ERROR if INFRA_ERROR in causes else PROMPT_TOO_LONG] += 1
            for number in members:
                _mask(out, rows[number], where[number])
                _set_reward(out, where[number], round(_mean(live) * GRAIN) / GRAIN)
    return dropped


def fill_side_channels(out: dict[str, Any]) -> None:
    """Give stubs what SkyRL wants of all rows or of none (from 0.4.0): routes of experts, sample support.

    Neither is looked at under a mask. A stub has one response token.
    """
    for name, nothing in (("rollout_expert_indices", 0), ("rollout_sample_support", -1)):
        values: list[Any] = out.get(name) or []
        example = next((value for value in values if value is not None and len(value)), None)
        if example is None:
            continue
        blank = [_blank(example[0], nothing)] if isinstance(example, list) else example[:1] * 0 + nothing
        out[name] = [blank if value is None else value for value in values]


def metrics(rows: list[Row], out: dict[str, Any], where: list[range], dropped: Counter[str]) -> dict[str, float]:
    """Figures of a call. Where SkyRL puts several together it goes by the name: all of these are means.

    (A name with `min` in it and without `mean` would be merged by its least, and `minisandbox/` has one.)
    """
    ours = [row for row in rows if row.ours]
    count = len(ours)
    groups = len({row.group for row in ours})
    figures = {
        "masked_mean": sum(row.masked or bool(row.cause) for row in ours) / count,
        "retries_mean": sum(row.retries for row in ours) / count,
        "wait_seconds_mean": sum(row.waited for row in ours) / count,
    }
    for cause in CAUSES:
        figures[f"dropped_groups_{cause}_mean"] = dropped[cause] / groups
    for outcome in Outcome:
        figures[f"outcome_{outcome}_mean"] = sum(row.outcome is outcome for row in ours) / count
    for ended_by in EndedBy:
        figures[f"ended_by_{ended_by}_mean"] = sum(row.ended_by is ended_by for row in ours) / count
    unmasked = [
        _reward(out, span) for row, span in zip(rows, where, strict=True) if row.ours and not (row.masked or row.cause)
    ]
    if unmasked:
        figures["reward_unmasked_mean"] = _mean(unmasked)
    return {f"minisandbox/{name}": float(value) for name, value in figures.items()}


def problem(entry: Any) -> str:
    """What is wrong with one of SkyRL's outputs for a rollout of ours, which would fail the whole batch; mostly ""."""
    ids, mask, logprobs, reward = entry.response_ids, entry.loss_mask, entry.rollout_logprobs, entry.reward
    if not ids:
        return "the policy answered nothing"
    if len(mask) != len(ids):
        return f"{len(mask)} of a mask for {len(ids)} tokens"
    if logprobs is not None and len(logprobs) != len(ids):
        return f"{len(logprobs)} log-probabilities for {len(ids)} tokens"
    if isinstance(reward, list) and len(reward) != len(ids):
        return f"{len(reward)} rewards for {len(ids)} tokens"
    rewards = reward if isinstance(reward, list) else [reward]
    if not (_all_are(Real, rewards) and math.isfinite(sum(rewards))):
        return f"a reward that is no number: {reward!r:.80}"
    if not _all_are(Integral, ids):
        return "a token that is no number"
    if not (isinstance(entry.env_metrics, dict) and _all_are(Real, list(entry.env_metrics.values()))):
        return f"figures that are no numbers: {entry.env_metrics!r:.80}"
    return ""


def cut_observation(entry: Any) -> None:
    """Take what comes after the model's last token off a turn: nobody will answer it.

    As SkyRL does for a whole rollout; of a turn it keeps it, and would then look for the reward at its end.
    """
    end = max((place + 1 for place, one in enumerate(entry.loss_mask) if one), default=len(entry.loss_mask))
    support = getattr(entry, "rollout_sample_support", None)
    entry.response_ids, entry.loss_mask = entry.response_ids[:end], entry.loss_mask[:end]
    if entry.rollout_logprobs is not None:
        entry.rollout_logprobs = entry.rollout_logprobs[:end]
    if isinstance(entry.reward, list):
        entry.reward = entry.reward[:end]
    if support is not None:
        entry.rollout_sample_support = support[:end]


def with_reward(reward: float | list[float], value: float) -> float | list[float]:
    """The same shape, holding `value`: of a list the last token."""
    return [0.0] * (len(reward) - 1) + [value] if isinstance(reward, list) else value


def _all_are(kind: type, values: Sequence[Any]) -> bool:
    return all(issubclass(each, kind) for each in set(map(type, values)))  # a response has thousands of tokens


def _live_rewards(out: dict[str, Any], rows: list[Row], where: list[range], members: Sequence[int]) -> list[float]:
    return [_reward(out, where[number]) for number in members if not rows[number].cause and len(where[number])]


def _reward(out: dict[str, Any], span: range) -> float:
    """Of a row: that of its last turn, which is what SkyRL trains on."""
    reward = out["rewards"][span[-1]]
    return float(sum(reward) if isinstance(reward, list) else reward)


def _mean(values: list[float]) -> float:
    """0.0 of none. Of equal values exactly that value, which a division need not give."""
    if not values:
        return 0.0
    return values[0] if min(values) == max(values) else sum(values) / len(values)


def _mask(out: dict[str, Any], row: Row, span: range) -> None:
    row.masked = True
    for entry in span:
        out["loss_masks"][entry] = [0] * len(out["loss_masks"][entry])


def _set_reward(out: dict[str, Any], span: range, value: float) -> None:
    """To every turn of a row: SkyRL's dynamic sampling looks at them one by one, its estimators at the last."""
    for entry in span:
        out["rewards"][entry] = with_reward(out["rewards"][entry], value)


def _blank(value: Any, nothing: int) -> Any:
    return [_blank(each, nothing) for each in value] if isinstance(value, list) else nothing
