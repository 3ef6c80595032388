"""The training data comes in one order, however often the training is resumed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from skyrl_minisandbox.training.order import ResumableOrder

ROWS, SIZE, EPOCHS = 19, 6, 4
BATCHES = ROWS // SIZE


def order(seed: int = 1) -> ResumableOrder:
    class Loader(SimpleNamespace):
        def __len__(self) -> int:
            return BATCHES

    return ResumableOrder(Loader(dataset=list(range(ROWS)), batch_size=SIZE, collate_fn=tuple), seed=seed)


def passes(loader: ResumableOrder, epochs: int) -> Iterator[tuple[int, ...]]:
    for _ in range(epochs):
        yield from loader


def test_an_epoch_has_no_row_twice_and_every_epoch_its_own_order() -> None:
    batches = list(passes(order(), EPOCHS))
    assert len(batches) == BATCHES * EPOCHS and all(len(batch) == SIZE for batch in batches)
    epochs = [list(itertools.chain(*batches[n : n + BATCHES])) for n in range(0, len(batches), BATCHES)]
    assert all(len(set(epoch)) == SIZE * BATCHES for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS
    assert list(passes(order(), EPOCHS)) == batches != list(passes(order(seed=2), EPOCHS))


@pytest.mark.parametrize("done", range(BATCHES * EPOCHS))
def test_a_resumed_training_has_the_batches_that_it_would_have_had(done: int) -> None:
    whole = list(passes(order(), EPOCHS))
    broken = order()
    for _ in itertools.islice(passes(broken, EPOCHS), done):
        state = broken.state_dict()
    resumed = order()
    if done:
        resumed.load_state_dict(state)
    # SkyRL's epochs that are left, of which the first is the broken one.
    assert list(passes(resumed, EPOCHS - done // BATCHES)) == whole[done:]


def test_a_state_of_skyrls_own_loader_is_refused() -> None:
    with pytest.raises(KeyError, match="minisandbox_epoch"):
        order().load_state_dict({"_snapshot": {}, "_steps_since_snapshot": 2})
