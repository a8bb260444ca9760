"""Adjacent clusters: the merge loop against the cut form, and small cases by hand (CRaSh, arXiv 2310.15477)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite_fl.emulators.clustering import NEVER, centre, clusters
from offsite_fl.errors import EmulatorError


def cut(similarities: Sequence[float], count: int) -> tuple[tuple[int, ...], ...]:
    """The cut form: a row of items broken at its ``count - 1`` smallest similarities."""
    order = sorted(range(len(similarities)), key=lambda i: similarities[i])
    ends = [*sorted(order[: count - 1]), len(similarities)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return tuple(tuple(range(start, end + 1)) for start, end in zip(starts, ends, strict=True))


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], int]:
    """Different similarities of up to 40 neighbours, and a number of clusters."""
    similarities = draw(st.lists(st.floats(-1, 1), unique=True, max_size=40))
    return similarities, draw(st.integers(1, len(similarities) + 1))


@given(rows())
def test_the_merge_loop_is_the_cut_at_the_smallest_similarities(row: tuple[list[float], int]) -> None:
    assert clusters(*row) == cut(*row)


@given(rows())
def test_every_item_is_in_one_cluster_and_in_order(row: tuple[list[float], int]) -> None:
    found = clusters(*row)
    assert len(found) == row[1]
    assert [item for cluster in found for item in cluster] == list(range(len(row[0]) + 1))


def test_by_hand() -> None:
    """0.9 joins 3 and 4, then 0.8 joins 0 and 1, then 0.7 takes 2 in; 0.3 and 0.2 hold out longest."""
    similarities = [0.8, 0.7, 0.2, 0.9, 0.3]
    assert clusters(similarities, 6) == ((0,), (1,), (2,), (3,), (4,), (5,))
    assert clusters(similarities, 5) == ((0,), (1,), (2,), (3, 4), (5,))
    assert clusters(similarities, 4) == ((0, 1), (2,), (3, 4), (5,))
    assert clusters(similarities, 3) == ((0, 1, 2), (3, 4), (5,))
    assert clusters(similarities, 2) == ((0, 1, 2), (3, 4, 5))
    assert clusters(similarities, 1) == ((0, 1, 2, 3, 4, 5),)


def test_of_equal_pairs_the_first_is_merged() -> None:
    assert clusters([0.5, 0.5, 0.5], 3) == ((0, 1), (2,), (3,))
    assert clusters([0.5, 0.5, 0.5], 2) == ((0, 1, 2), (3,))
    assert clusters([0.1, 0.5, 0.5], 3) == ((0,), (1, 2), (3,))


def test_apart_stays_apart() -> None:
    similarities = [0.1, NEVER, -0.9]
    assert clusters(similarities, 3) == ((0, 1), (2,), (3,))
    assert clusters(similarities, 2) == ((0, 1), (2, 3))
    with pytest.raises(EmulatorError, match="4 blocks can't be put into 1 clusters: it must be 2 to 4"):
        clusters(similarities, 1)


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_impossible_counts(count: int) -> None:
    with pytest.raises(EmulatorError, match=f"3 blocks can't be put into {count} clusters: it must be 1 to 3"):
        clusters([0.1, 0.2], count)


def test_one_item() -> None:
    assert clusters([], 1) == ((0,),)


@pytest.mark.parametrize(("cluster", "stays"), [("5", 5), ("56", 6), ("567", 6), ("5678", 7), ("56789", 7)])
def test_the_centre_is_at_half_the_length(cluster: str, stays: int) -> None:
    assert centre([int(item) for item in cluster]) == stays
