"""Neighbours that do much the same work, put together: the adjacent clusters of CRaSh (arXiv 2310.15477).

Numbers only: what the items are and how alike two neighbours are is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from offsite_fl.errors import EmulatorError

NEVER = -math.inf
"""The similarity of two neighbours that may not share a cluster."""


def clusters(similarities: Sequence[float], count: int) -> tuple[tuple[int, ...], ...]:
    """Put items in a row together until ``count`` clusters are left.

    Every item begins as a cluster of its own; as long as there are too many, the two adjacent clusters whose last and
    first item are most alike become one, of equal pairs the first. Because only items at a boundary are compared, the
    result is the row cut at its ``count - 1`` smallest similarities, ties aside.

    Args:
        similarities: ``[i]`` says how alike items ``i`` and ``i + 1`` are, so there is one more item than numbers;
            :data:`NEVER` for two that may not share a cluster.
        count: how many clusters to make; ``EmulatorError`` unless it fits.

    Returns:
        The items of each cluster, in order.

    >>> clusters([0.9, 0.1, 0.8], 2)
    ((0, 1), (2, 3))
    """
    items, least = len(similarities) + 1, 1 + sum(similarity == NEVER for similarity in similarities)
    if not least <= count <= items:
        raise EmulatorError(f"{items} blocks can't be put into {count} clusters: it must be {least} to {items}")
    found: list[tuple[int, ...]] = [(item,) for item in range(items)]
    while len(found) > count:
        alike = [similarities[cluster[-1]] for cluster in found[:-1]]
        first = alike.index(max(alike))
        found[first : first + 2] = [found[first] + found[first + 1]]
    return tuple(found)


def centre(cluster: Sequence[int]) -> int:
    """The item of a cluster that stays: the second of two, the middle one of three.

    >>> centre((4,)), centre((4, 5)), centre((4, 5, 6)), centre((4, 5, 6, 7))
    (4, 5, 5, 6)
    """
    return cluster[len(cluster) // 2]
