"""Who runs in a removed place, by hand from the rules of CRaSh (arXiv 2310.15477)."""

from __future__ import annotations

from offsite_fl.emulators.sharing import stand_ins


def test_the_nearest_and_of_two_equally_near_the_right() -> None:
    """Kept 0 and 6: 1 and 2 are nearer to 0, 3 is as near to both, 4 and 5 are nearer to 6."""
    assert stand_ins(range(1, 6), [0, 6], [], "all") == {1: 0, 2: 0, 3: 6, 4: 6, 5: 6}
    assert stand_ins(range(1, 5), [0, 5], [], "all") == {1: 0, 2: 0, 3: 5, 4: 5}


def test_only_one_side_is_kept() -> None:
    assert stand_ins([0, 1, 5, 6], [2, 4], [], "all") == {0: 2, 1: 2, 5: 4, 6: 4}


def test_none_leaves_places_empty() -> None:
    assert stand_ins([1, 2, 3], [0, 4], [], "none") == {}


def test_all_takes_adapter_blocks_too() -> None:
    assert stand_ins([1, 2, 4, 5], [3], [0, 6], "all") == {1: 0, 2: 3, 4: 3, 5: 6}


def test_frozen_only_turns_to_the_other_side() -> None:
    """Adapter 0 and 6: 1 and 5 are nearest to an adapter block, their other neighbour 3 is frozen."""
    assert stand_ins([1, 2, 4, 5], [3], [0, 6], "frozen-only") == {1: 3, 2: 3, 4: 3, 5: 3}


def test_frozen_only_leaves_a_frozen_nearest_alone() -> None:
    assert stand_ins([1, 2], [0], [3], "frozen-only") == {1: 0, 2: 0}
    assert stand_ins([1, 2, 3], [0], [4], "frozen-only") == {1: 0, 2: 0, 3: 0}


def test_frozen_only_between_two_adapter_blocks() -> None:
    """Neither neighbour of 2 is frozen, so the nearest stays, though 5 is frozen further on."""
    assert stand_ins([2], [5], [0, 3], "frozen-only") == {2: 3}


def test_frozen_only_at_the_edge() -> None:
    """Nothing is kept to the right of 4, so the adapter block on its left is the only one."""
    assert stand_ins([4], [1], [3], "frozen-only") == {4: 3}
