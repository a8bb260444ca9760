"""Which kept block runs in the place of one that was removed (CRaSh, arXiv 2310.15477)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

Sharing = Literal["none", "all", "frozen-only"]


def stand_ins(
    removed: Iterable[int], frozen: Collection[int], adapter: Collection[int], sharing: Sharing
) -> dict[int, int]:
    """The place whose block runs in each removed place.

    The nearest kept place: the one on the left if it is strictly nearer, else the one on the right. With
    ``frozen-only``, where that is an adapter block, the frozen one of the two kept neighbours, the left before the
    right; where neither is frozen the adapter block all the same.

    Args:
        removed: places without a block of their own.
        frozen: places of the emulator's blocks that stay.
        adapter: places of the adapter's blocks.
        sharing: ``none`` leaves every removed place empty.

    >>> stand_ins([2, 3, 4], [5], [1], "all")
    {2: 1, 3: 5, 4: 5}
    >>> stand_ins([2, 3, 4], [5], [1], "frozen-only")
    {2: 5, 3: 5, 4: 5}
    """
    kept = sorted({*frozen, *adapter})
    if sharing == "none":
        return {}
    found = {}
    for place in removed:
        left = max((k for k in kept if k < place), default=None)
        right = min((k for k in kept if k > place), default=None)
        sides = [side for side in (left, right) if side is not None]
        nearest = left if right is None or (left is not None and place - left < right - place) else right
        assert nearest is not None
        if sharing == "frozen-only" and nearest in adapter:
            nearest = next((side for side in sides if side not in adapter), nearest)
        found[place] = nearest
    return found
