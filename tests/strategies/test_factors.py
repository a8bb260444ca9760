"""Averages of products by hand and against the dense matrices; factors of a given rank against numpy's SVD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from offsite_fl.errors import WireError
from offsite_fl.strategies.factors import bias, linears, refactored, shares, stacked

A, B = "adapter.0.q.lora_A.weight", "adapter.0.q.lora_B.weight"
LINEAR = "adapter.0.q"
# Two data owners that pull at different corners: B1 A1 = e1 e1', B2 A2 = e2 e2'.
CORNERS = [
    {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])},
    {A: torch.tensor([[0.0, 1.0]]), B: torch.tensor([[0.0], [1.0]])},
]


def random_updates(count: int, out: int, rank: int, columns: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {A: torch.randn(rank, columns, generator=rng), B: torch.randn(out, rank, generator=rng)} for _ in range(count)
    ]


def dense(updates: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> np.ndarray:
    total = sum(weights)
    return sum(w / total * (u[B].double() @ u[A].double()).numpy() for w, u in zip(weights, updates, strict=True))  # type: ignore[return-value]


def test_stacking_is_the_average_of_the_products_by_hand() -> None:
    up, down = stacked(CORNERS, [1, 1], LINEAR)
    assert (up @ down).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    up, down = stacked(CORNERS, [1, 3], LINEAR)
    assert (up @ down).tolist() == [[0.25, 0.0], [0.0, 0.75]]


def test_the_bias_of_plain_averages_by_hand() -> None:
    # mean B mean A is 1/4 everywhere, the mean product diag(1/2, 1/2): ||[[-1, 1], [1, -1]] / 4|| = 1/2 of sqrt(1/2)
    assert bias(CORNERS, [1, 1], LINEAR) == pytest.approx(0.5 / 0.5**0.5)
    # the covariance p1 p2 (B1 - B2)(A1 - A2) is that difference: 3/16 ||[[1, -1], [-1, 1]]|| = 3/8 of ||(1/4, 3/4)||
    assert bias(CORNERS, [1, 3], LINEAR) == pytest.approx(3 / 8 / np.hypot(1 / 4, 3 / 4))
    same_a = [CORNERS[0], {A: CORNERS[0][A], B: CORNERS[1][B]}]
    assert bias(same_a, [1, 3], LINEAR) == 0.0 and bias(CORNERS[:1], [5], LINEAR) == 0.0
    updates, weights = random_updates(3, 6, 2, 4), [1.0, 2.0, 5.0]
    means = [sum(w / 8 * u[end].double() for w, u in zip(weights, updates, strict=True)) for end in (B, A)]
    off = (means[0] @ means[1]).numpy() - dense(updates, weights)  # type: ignore[operator]
    expected = np.linalg.norm(off) / np.linalg.norm(dense(updates, weights))
    assert bias(updates, weights, LINEAR) == pytest.approx(expected)
    zeros = [{name: torch.zeros_like(t) for name, t in CORNERS[0].items()}]
    assert bias(zeros, [1], LINEAR) == 0.0


@pytest.mark.parametrize(("out", "columns", "count", "rank"), [(7, 5, 3, 2), (3, 9, 4, 3), (6, 2, 2, 2), (5, 5, 1, 3)])
def test_refactoring_is_the_best_of_its_rank(out: int, columns: int, count: int, rank: int) -> None:
    updates, weights = random_updates(count, out, rank, columns), list(range(1, count + 1))
    exact = dense(updates, weights)
    up, down, lost = refactored(*stacked(updates, weights, LINEAR), rank)
    assert up.shape == (out, rank) and down.shape == (rank, columns)
    values = np.linalg.svd(exact, compute_uv=False)
    # Eckart and Young: the nearest matrix of this rank is as far away as the singular values that are left out
    error = np.linalg.norm((up @ down).numpy() - exact)
    assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-10)
    assert lost == pytest.approx((values[rank:] ** 2).sum() / (values**2).sum(), abs=1e-12)
    # the singular values lie in B, in order, and A's rows are orthonormal with a positive largest entry
    kept = min(rank, out, columns)
    np.testing.assert_allclose(torch.linalg.vector_norm(up, dim=0)[:kept].numpy(), values[:kept], atol=1e-10)
    np.testing.assert_allclose((down @ down.T).numpy()[:kept, :kept], np.eye(kept), atol=1e-10)
    assert all(row[row.abs().argmax()] > 0 for row in down[:kept])


def test_the_first_components_are_the_best_of_a_smaller_rank() -> None:
    updates = random_updates(3, 8, 4, 6)
    up, down, _ = refactored(*stacked(updates, [1, 1, 1], LINEAR), 4)
    exact = dense(updates, [1, 1, 1])
    left_out = np.linalg.svd(exact, compute_uv=False)[2:]
    assert np.linalg.norm((up[:, :2] @ down[:2]).numpy() - exact) == pytest.approx(np.linalg.norm(left_out))


def test_the_order_of_the_stack_changes_nothing_beyond_rounding() -> None:
    updates, weights = random_updates(4, 9, 2, 7), [3.0, 1.0, 4.0, 1.5]
    first = refactored(*stacked(updates, weights, LINEAR), 2)
    other = refactored(*stacked(updates[::-1], weights[::-1], LINEAR), 2)
    torch.testing.assert_close(first[0], other[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first[1], other[1], rtol=1e-9, atol=1e-9)


def test_a_component_without_weight_can_still_be_trained() -> None:
    # rank 1 in a run of rank 3: the other rows of A must not be zero, or neither factor would ever get a gradient
    update = {A: torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), B: torch.zeros(4, 3)}
    update[B][:, 0] = 1.0
    up, down, lost = refactored(*stacked([update], [1], LINEAR), 3)
    torch.testing.assert_close(up @ down, update[B].double() @ update[A].double())
    assert lost == 0.0 or lost < 1e-30
    torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64))
    assert float(up[:, 1:].abs().max()) < 1e-12
    nothing = refactored(torch.zeros(4, 3), torch.zeros(3, 3), 2)
    assert nothing[2] == 0.0 and float(nothing[0].abs().max()) == 0.0 and float(nothing[1].norm()) > 1


def test_a_rank_above_the_linear_s_size() -> None:
    updates = random_updates(1, 2, 5, 3)
    up, down, lost = refactored(*stacked(updates, [1], LINEAR), 5)
    assert up.shape == (2, 5) and down.shape == (5, 3) and lost == 0.0
    np.testing.assert_allclose((up @ down).numpy(), dense(updates, [1]), atol=1e-12)


def test_factors_come_in_pairs() -> None:
    assert linears(CORNERS[0]) == [LINEAR]
    for names in ({A: 1}, {B: 1}, {"adapter.0.q.weight": 1, A: 1, B: 1}):
        with pytest.raises(WireError, match="isn't one of a pair"):
            linears(names)


def test_shares() -> None:
    assert shares([1, 3]) == [0.25, 0.75]
    with pytest.raises(WireError, match="must be above 0"):
        shares([])
