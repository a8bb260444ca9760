"""Norms and clipping on numbers that can be worked out by hand, and the properties of a projection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite_fl.strategies.norms import clipped, update_norm

SENT = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[5.0]])}
# updates (3, 0) and (4): norm 5
FAR = {"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([[9.0]])}


def test_the_norm_is_over_all_tensors() -> None:
    assert update_norm(FAR, SENT) == 5.0
    assert update_norm(SENT, SENT) == 0.0


def test_a_reply_outside_comes_to_the_bound_on_the_same_line() -> None:
    found = clipped(FAR, SENT, 5.0, 2.5)
    assert torch.equal(found["a"], torch.tensor([2.5, 2.0])) and torch.equal(found["b"], torch.tensor([[7.0]]))
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.parametrize("bound", [5.0, 6.0, math.nextafter(5.0, 6.0)])
def test_a_reply_within_stays_bit_for_bit(bound: float) -> None:
    found = clipped(FAR, SENT, 5.0, bound)
    assert all(torch.equal(found[name], FAR[name]) for name in FAR)


def test_values_whose_squares_leave_fp32() -> None:
    far = {"a": torch.tensor([1.0, 3e38]), "b": torch.tensor([[-3e38]])}
    norm = update_norm(far, SENT)
    assert norm == pytest.approx(math.sqrt(2) * 3e38, rel=1e-6)
    found = clipped(far, SENT, norm, 1.0)
    assert update_norm(found, SENT) == pytest.approx(1.0, rel=1e-6)


@given(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), st.floats(0.01, 50))
@settings(max_examples=60, deadline=None)
def test_clipping_is_a_projection(values: list[float], bound: float) -> None:
    """Never beyond the bound, and once more changes nothing: the nearest point of a ball."""
    reply = {"a": torch.tensor(values[:2]), "b": torch.tensor([values[2:]])}
    once = clipped(reply, SENT, update_norm(reply, SENT), bound)
    slack = 1e-4  # fp32 rounding of values to 100
    assert update_norm(once, SENT) <= bound + slack
    twice = clipped(once, SENT, update_norm(once, SENT), bound)
    assert all(torch.allclose(once[name], twice[name], rtol=0, atol=slack) for name in SENT)
