"""Samples of several contenders, taken in turn: never one block after another, so that what else the machine does
meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Sample = Callable[[], float]


def alternate(
    samples: Mapping[str, Sample], *, rounds: int, budget: float, pause: float = 0.0, least: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call each in turn, `rounds` times; (the values by name, why some of them stopped).

    budget: seconds that one contender may take in all, pauses left out; after it, and `least` values, it is not called
    any more. pause: seconds before each call. What ended a moment ago has work left in the kernel (network namespaces
    are taken apart and grace periods of RCU waited for), and without a pause the next one pays for it.
    """
    values: dict[str, list[float]] = {name: [] for name in samples}
    spent = dict.fromkeys(samples, 0.0)
    failed: dict[str, str] = {}
    names = list(samples)
    for round_number in range(rounds):
        turn = round_number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if name in failed or (spent[name] > budget and len(values[name]) >= least):
                continue
            time.sleep(pause)
            started = time.perf_counter()
            try:
                values[name].append(samples[name]())
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            spent[name] += time.perf_counter() - started
    return {name: found for name, found in values.items() if found}, failed
