"""The order of the training data, the same whether a training runs through or is resumed.

SkyRL's own loader (torchdata's) goes on within an epoch. But after a resume each later epoch has another order than it
would have had, and a checkpoint at the end of an epoch, where SkyRL always writes one, resumes with an epoch without
batches: that epoch is lost (seen with SkyRL 0.3.0 and 0.4.0, torchdata 0.11).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any


class ResumableOrder:
    """In place of a `StatefulDataLoader`: its data set, batches and collation; each epoch's order by seed and epoch.

    loader: SkyRL's. As SkyRL trains, batches that do not fill up are left out. seed: of all orders.
    """

    def __init__(self, loader: Any, *, seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._epoch = 0
        self._batches = 0  # of this epoch that were handed out

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """The rest of this epoch; where there is none, the next one."""
        self.load_state_dict(self.state_dict())
        dataset, size = self._loader.dataset, self._loader.batch_size
        order = list(range(len(dataset)))
        random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        for number in range(self._batches, len(self)):
            self._batches = number + 1
            yield self._loader.collate_fn([dataset[row] for row in order[number * size : (number + 1) * size]])
        self._epoch, self._batches = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the order is; what was handed out counts as done."""
        epochs, batches = divmod(self._epoch * len(self) + self._batches, len(self))
        return {"minisandbox_epoch": epochs, "minisandbox_batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises `KeyError` for a state of another loader; SkyRL says so and begins anew."""
        self._epoch, self._batches = state["minisandbox_epoch"], state["minisandbox_batches"]
