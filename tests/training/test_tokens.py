"""Token in, token out: what is trained is what the engine sent, and its text is what the scaffold received.

The engine spells its answers in tokens that the tokenizer would not make of the same text, so that whoever decodes and
encodes again shows. Two chat templates, step-wise and not, on SkyRL 0.3.0 and 0.4.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.skyrl.environment import VERSIONS
from tests.support import needs
from tests.training.conftest import Trainers

pytestmark = [needs("userns", "overlay", "git", "network")]

CI = {"0.4.0-chatml-whole", "0.4.0-stripping-step_wise"}
"""What the ci tier has time for."""

SESSIONS = ["0_0", "0_1", "1_0", "1_1", "2_0", "2_1"]
REWARDS = {"0_0": 1.0, "0_1": 0.0, "1_0": 1.0, "1_1": 1.0, "2_0": 0.0, "2_1": 0.0}
TURNS = {"0_0": 3, "0_1": 2, "1_0": 5, "1_1": 2, "2_0": 1, "2_1": 5}


def cases() -> Iterator[Any]:
    for version, template, step_wise in product(VERSIONS, ("chatml", "stripping"), (False, True)):
        name = f"{version}-{template}-{'step_wise' if step_wise else 'whole'}"
        tier = pytest.mark.ci if name in CI else pytest.mark.night
        yield pytest.param((version, template, step_wise), id=name, marks=tier)


@pytest.fixture(scope="module", params=list(cases()))
def case(
    request: Any, trainers: Trainers, small_images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    version, template, step_wise = request.param
    out = tmp_path_factory.mktemp("run")
    found = generated(trainers, version, small_images, out, template=template, step_wise=step_wise)
    return {**found, "template": template, "step_wise": step_wise}


def generated(trainers: Trainers, version: str, images: dict[str, str], out: Path, **more: Any) -> Any:
    arguments = {"template": "chatml", "step_wise": False, "canonical": False, **more}
    return trainers.call(
        version, "tests.training.tokens:run", timeout=300, env={"images": images}, out=str(out), **arguments
    )


def rows_of(rows: list[dict[str, Any]], session: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["session"] == session]


def trained(rows: list[dict[str, Any]], key: str = "ids") -> list[Any]:
    return [value for row in rows for value, one in zip(row[key], row["mask"], strict=True) if one]


def sent(found: dict[str, Any], session: str, key: str = "ids") -> list[Any]:
    return [value for turn in found["sessions"][session]["turns"] for value in turn[key]]


def test_rows_come_in_the_order_they_were_asked_for(case: dict[str, Any]) -> None:
    order = list(dict.fromkeys(row["session"] for row in case["rows"]))
    assert order == SESSIONS
    counts = [len(rows_of(case["rows"], session)) for session in SESSIONS]
    assert counts == ([TURNS[session] for session in SESSIONS] if case["step_wise"] else [1] * 6)


def test_the_trained_tokens_are_the_engines_own(case: dict[str, Any]) -> None:
    for session in SESSIONS:
        rows = rows_of(case["rows"], session)
        assert trained(rows) == sent(case, session)
        assert len(case["sessions"][session]["turns"]) == TURNS[session]


def test_encoding_them_again_would_give_others(case: dict[str, Any]) -> None:
    assert sent(case, "1_0") != sent(case, "1_0", "encoded_again")


def test_their_log_probs_are_the_engines_own(case: dict[str, Any]) -> None:
    for session in SESSIONS:
        rows = rows_of(case["rows"], session)
        assert trained(rows, "logprobs") == sent(case, session, "logprobs")
        for row in rows:
            others = [value for value, one in zip(row["logprobs"], row["mask"], strict=True) if not one]
            assert not any(others)


def test_under_the_mask_stands_what_the_scaffold_received(case: dict[str, Any]) -> None:
    for session in SESSIONS:
        received = case["sessions"][session]
        ours = [text for row in rows_of(case["rows"], session) for one, text in row["parts"] if one]
        answers = [each["content"] for each in received["messages"] if each["role"] == "assistant"]
        assert ours == [answer + received["end"] for answer in answers]


def test_beside_it_stands_what_the_scaffold_said(case: dict[str, Any]) -> None:
    for session in SESSIONS:
        messages = case["sessions"][session]["messages"]
        said = [each["content"] for each in messages[2:] if each["role"] == "user"]
        others = [text for row in rows_of(case["rows"], session) for one, text in row["parts"] if not one]
        wanted = [f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in said]
        assert others == wanted[: TURNS[session] - 1]


def test_the_engine_is_asked_with_exactly_what_is_trained(case: dict[str, Any]) -> None:
    for session in SESSIONS:
        turns = case["sessions"][session]["turns"]
        rows = rows_of(case["rows"], session)
        assert rows[0]["prompt_text"] == turns[0]["rendered"]
        if case["step_wise"]:
            assert [row["prompt"] for row in rows] == [turn["prompt"] for turn in turns]
            assert [row["prompt_text"] for row in rows] == [turn["rendered"] for turn in turns]
            continue
        (row,) = rows
        whole = row["prompt"] + row["ids"]
        for turn in turns:
            assert turn["prompt"] == whole[: len(turn["prompt"])]
            assert whole[len(turn["prompt"]) :][: len(turn["ids"])] == turn["ids"]


def test_a_template_that_strips_earlier_reasoning_does_so_in_prompts_only(case: dict[str, Any]) -> None:
    rows = rows_of(case["rows"], "0_0")
    texts = [text for row in rows for one, text in row["parts"] if one]
    assert sum("<think>" in text for text in texts) == 2  # it is trained in any case
    if case["step_wise"]:
        seen = [row["prompt_text"].count("<think>") for row in rows]
        assert seen == ([0, 0, 0] if case["template"] == "stripping" else [0, 1, 2])


def test_the_reward_is_on_the_last_trained_token(case: dict[str, Any]) -> None:
    for session in SESSIONS:
        *earlier, last = rows_of(case["rows"], session)
        place = max(number for number, one in enumerate(last["mask"]) if one)
        assert [number for number, value in enumerate(last["reward"]) if value] == [place] * (REWARDS[session] == 1.0)
        assert sum(last["reward"]) == REWARDS[session]
        assert not any(sum(row["reward"]) for row in earlier)


def test_turns_that_are_merged_keep_their_tokens(case: dict[str, Any]) -> None:
    if not case["step_wise"]:
        pytest.skip("only turns are merged")
    for session in SESSIONS:
        rows = rows_of(case["merged"], session)
        assert trained(rows) == sent(case, session)
        assert trained(rows, "logprobs") == sent(case, session, "logprobs")
        assert [row["last"] for row in rows] == [False] * (len(rows) - 1) + [True]


def test_dynamic_sampling_keeps_rows_whole(case: dict[str, Any]) -> None:
    known = Counter((row["session"].split("_")[0], sum(row["reward"]), tuple(row["ids"])) for row in case["rows"])
    assert not Counter((uid, reward, tuple(ids)) for uid, reward, ids in case["filtered"]) - known
    groups = [uid for uid, _, _ in case["filtered"]]
    if case["step_wise"]:  # SkyRL looks at each turn's reward, so that a group that was always right has a spread
        assert list(dict.fromkeys(groups)) == ["0", "1"]
        return
    assert groups == ["0", "0"]
    assert [uid for uid, _, _ in case["replaced"]] == ["0"] * 6
    assert {(reward, tuple(ids)) for _, reward, ids in case["replaced"]} == {
        (reward, tuple(ids)) for _, reward, ids in case["filtered"]
    }


@pytest.mark.night
@pytest.mark.parametrize("version", VERSIONS)
def test_turns_of_the_tokenizers_own_tokens_merge_to_one_row(
    version: str, trainers: Trainers, small_images: dict[str, str], tmp_path: Path
) -> None:
    found = generated(trainers, version, small_images, tmp_path, step_wise=True, canonical=True)
    assert [row["session"] for row in found["merged"]] == SESSIONS
    for row in found["merged"]:
        assert trained([row]) == sent(found, row["session"])
        assert row["prompt_text"] == found["sessions"][row["session"]]["turns"][0]["rendered"]


@pytest.mark.night
@pytest.mark.parametrize("step_wise", [False, True], ids=["whole", "step_wise"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_group_with_a_failed_row_is_not_chosen(
    version: str, step_wise: bool, trainers: Trainers, small_images: dict[str, str], tmp_path: Path
) -> None:
    found = generated(trainers, version, small_images, tmp_path, step_wise=step_wise, broken=True)
    rows = [row for session in ("1_0", "1_1") for row in rows_of(found["rows"], session)]
    assert rows and not trained(rows)
    assert {uid for uid, _, _ in found["filtered"]} == {"0"}
