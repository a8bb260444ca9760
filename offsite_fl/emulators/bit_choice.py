"""How many bits each linear gets under a budget: few everywhere, more where they take away most error for a byte."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(frozen=True)
class Stage(Generic[K]):
    """One way of storing a linear: ``choice`` names it, ``bytes`` is what it takes.

    ``error`` is the relative squared error of the weight, ``||W - W'||^2 / ||W||^2``.
    """

    choice: K
    bytes: int
    error: float


def spend(stages: Mapping[str, Sequence[Stage[K]]], budget: int) -> dict[str, K]:
    """Choose one stage for each key so that all together take at most ``budget`` bytes.

    All start at their first stage, whatever that takes. Then the key whose next stage lowers its error most per extra
    byte moves there, as long as that fits; one that doesn't fit stays, and others go on.

    >>> ways = [Stage(4, 10, 0.1), Stage(8, 20, 0.001)]
    >>> spend({"a": ways, "b": [Stage(4, 5, 0.1), Stage(8, 10, 0.001)]}, 22)
    {'a': 4, 'b': 8}
    """
    at = dict.fromkeys(stages, 0)
    held = sum(ways[0].bytes for ways in stages.values())
    waiting: list[tuple[float, int, str]] = []
    order = {key: number for number, key in enumerate(stages)}

    def offer(key: str) -> None:
        if at[key] + 1 < len(stages[key]):
            here, there = stages[key][at[key] : at[key] + 2]
            gain = (here.error - there.error) / max(1, there.bytes - here.bytes)
            heapq.heappush(waiting, (-gain, order[key], key))

    for key in stages:
        offer(key)
    while waiting:
        _, _, key = heapq.heappop(waiting)
        extra = stages[key][at[key] + 1].bytes - stages[key][at[key]].bytes
        if held + extra <= budget:
            at[key], held = at[key] + 1, held + extra
            offer(key)
    return {key: stages[key][stage].choice for key, stage in at.items()}
