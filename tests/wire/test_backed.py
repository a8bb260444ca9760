"""Factors are made only where the message brought as much, or where the rank can't be large."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array

from offsite_fl.errors import ConfigError, WireError
from offsite_fl.wire.backed import check_backed

A, B = "adapter.0.q.lora_A.weight", "adapter.0.q.lora_B.weight"


def shapes(rank: int) -> dict[str, tuple[int, int]]:
    return {A: (rank, 5), B: (3, rank)}


def factors(rank: int, dtype: str = "float32") -> dict[str, Array]:
    return {name: Array(np.zeros(shape, dtype)) for name, shape in shapes(rank).items()}


def test_what_came_may_have_any_rank() -> None:
    for dtype in ("float32", "float16", "int8"):
        check_backed(factors(40, dtype), shapes(40))


def test_a_rank_that_only_the_settings_have() -> None:
    with pytest.raises(WireError, match=r"lora_A.weight' has shape \(1, 5\), expected \(1000000, 5\)"):
        check_backed(factors(1), shapes(10**6))
    short = {**factors(2), A: Array(dtype="int8", shape=(10**6, 5), stype="numpy.ndarray", data=b"x" * 100)}
    with pytest.raises(WireError, match="has 100 bytes"):
        check_backed(short, shapes(10**6))


@pytest.mark.parametrize("left", [A, B])
def test_where_a_factor_did_not_come_the_linear_bounds_the_rank(left: str) -> None:
    """W is 3 x 5, so 3 is all the rank that B A can have."""
    for rank, fits in ((3, True), (4, False)):
        arrays = {name: array for name, array in factors(rank).items() if name != left}
        if fits:
            check_backed(arrays, shapes(rank))
            check_backed({}, shapes(rank))
        else:
            with pytest.raises(ConfigError, match=r"lora-rank = 4 is more than .* set it to 3 or less"):
                check_backed(arrays, shapes(rank))


def test_the_largest_linear_counts() -> None:
    wide = {"adapter.0.v.lora_A.weight": (4, 9), "adapter.0.v.lora_B.weight": (4, 4)}
    check_backed({}, {**shapes(4), **wide})
