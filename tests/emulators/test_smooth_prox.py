"""Proximal operators: stationary, shrinking, and what methods.md checked numerically on random matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from offsite_fl.emulators.penalties import Dim, Kind, Penalty
from offsite_fl.emulators.smooth_prox import proximal, shrink, smoothed
from tests.emulators.test_penalties import difference_matrix, random_matrix

SHAPES = [(12, 9), (9, 12), (5, 5)]


def moments_of(width: int) -> Tensor:
    x = random_matrix(40, width, seed=7) * torch.arange(1, width + 1)
    return x.T @ x / 40


def tail(weight: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(weight).square()
    return float(squares[rank:].sum() / squares.sum())


@pytest.mark.parametrize("lam", [1e-3, 0.35, 20.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("order", [1, 2])
def test_smoothed_is_stationary(order: int, count: int, lam: float) -> None:
    """(W* - W0) + 2 lam D'D W* = 0."""
    given = random_matrix(count, 9)
    found = smoothed(given, [order], lam)
    d = difference_matrix(count, order) if count > order else torch.zeros(1, count).double()
    assert_close(found - given + 2 * lam * d.T @ d @ found, torch.zeros_like(given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["d1", "d2"])
def test_along_inputs_and_in_runs(kind: Kind) -> None:
    weight = random_matrix(12, 9)
    order = {"d1": 1, "d2": 2}[kind]
    exact = torch.linalg.inv(torch.eye(9) + 0.7 * difference_matrix(9, order).T @ difference_matrix(9, order))
    assert_close(proximal(weight, [Penalty(kind, ("in",))], 0.35), weight @ exact)
    halves = proximal(weight, [Penalty(kind, runs=2)], 0.35)
    assert_close(halves, torch.cat([smoothed(weight[:6], [order], 0.35), smoothed(weight[6:], [order], 0.35)]))
    assert_close(proximal(weight, [Penalty(kind)], 0.35), smoothed(weight, [order], 0.35))


@pytest.mark.parametrize("dims", [("out",), ("in",)])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_the_sum_of_both_differences(count: int, dims: tuple[Dim, ...]) -> None:
    """(I + 2 lam (D1'D1 + D2'D2))^-1 W0, in whichever order the two are named."""
    first, second = (
        difference_matrix(count, order) if count > order else torch.zeros(1, count).double() for order in (1, 2)
    )
    exact = torch.linalg.inv(torch.eye(count) + 0.7 * (first.T @ first + second.T @ second))
    given = random_matrix(count, 9)
    weight, expected = (given, exact @ given) if dims == ("out",) else (given.T, (exact @ given).T)
    for kinds in (("d1", "d2"), ("d2", "d1")):
        assert_close(proximal(weight, [Penalty(kind, dims) for kind in kinds], 0.35), expected)


def test_no_inputs_of_two_runs_pull_at_each_other() -> None:
    weight = random_matrix(4, 12)
    found = proximal(weight, [Penalty("d1", ("in",), runs_in=3)], 0.35)
    parts = [smoothed(part.T, [1], 0.35).T for part in weight.split(4, dim=1)]
    assert_close(found, torch.cat(parts, dim=1))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shrink_takes_the_threshold_from_every_singular_value(shape: tuple[int, int], weighted: bool) -> None:
    """In the space of W C^1/2, of which C^1/2 is the symmetric root here."""
    weight = random_matrix(*shape)
    root = torch.eye(shape[1]).double()
    if weighted:
        values, vectors = torch.linalg.eigh(moments_of(shape[1]))
        root = vectors * values.sqrt() @ vectors.T
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    threshold = float(s[2])
    expected = (u * (s - threshold).clamp(min=0)) @ vt @ torch.linalg.inv(root)
    found = shrink(weight, threshold, root @ root if weighted else None)
    assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert int(torch.linalg.matrix_rank(found, atol=1e-9)) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shrink_minimises_its_objective(shape: tuple[int, int]) -> None:
    """No matrix near to it does better: the objective is convex, so none at all does."""
    given = random_matrix(*shape)

    def objective(w: Tensor) -> float:
        return float((w - given).square().sum() / 2 + 0.8 * torch.linalg.matrix_norm(w, "nuc"))

    found = shrink(given, 0.8)
    assert objective(found) < objective(given)
    for seed in range(20):
        assert objective(found + 1e-3 * random_matrix(*shape, seed=seed + 1)) > objective(found)


def test_the_factor_of_the_nuclear_norm_is_a_share_of_the_size() -> None:
    weight = random_matrix(6, 4)
    size = float(weight.square().sum().sqrt())
    assert_close(proximal(weight, [Penalty("nuc")], 0.1), shrink(weight, 0.1 * size))
    assert_close(proximal(50 * weight, [Penalty("nuc")], 0.1), 50 * shrink(weight, 0.1 * size))
    moments = moments_of(4)
    weighted_size = float(torch.einsum("oi,ij,oj->", weight, moments, weight)) ** 0.5
    assert_close(proximal(weight, [Penalty("nuc")], 0.1, moments), shrink(weight, 0.1 * weighted_size, moments))


@pytest.mark.parametrize("kind", ["nuc", "d1", "d2"])
def test_a_factor_of_zero_changes_nothing(kind: Kind) -> None:
    weight = random_matrix().float()
    assert torch.equal(proximal(weight, [Penalty(kind)], 0.0), weight.double())
    assert torch.equal(proximal(weight, (), 0.5), weight.double())
    assert not proximal(torch.zeros(3, 2), [Penalty(kind)], 0.1).any()


def test_moments_do_not_change_what_differences_of_outputs_give() -> None:
    weight, root = random_matrix(6, 4), torch.linalg.cholesky(moments_of(4))
    there = torch.linalg.inv(torch.eye(6) + 0.2 * difference_matrix(6, 2).T @ difference_matrix(6, 2)) @ (weight @ root)
    assert_close(proximal(weight, [Penalty("d2")], 0.1, moments_of(4)), there @ torch.linalg.inv(root))


def test_the_checked_numbers_of_random_matrices() -> None:
    """12 x 9, I + .7 D'D, rank 3: tail .334 -> .217 (D1) and .148 (D2) in one draw, W moved by 55 to 66 %."""
    tails = {"plain": 0.0, "d1": 0.0, "d2": 0.0}
    moved = {"d1": 0.0, "d2": 0.0}
    draws = 40
    for seed in range(draws):
        weight = random_matrix(12, 9, seed=seed)
        tails["plain"] += tail(weight, 3) / draws
        for kind, order in (("d1", 1), ("d2", 2)):
            smooth = smoothed(weight, [order], 0.35)
            assert tail(smooth, 3) < tail(weight, 3)
            tails[kind] += tail(smooth, 3) / draws
            moved[kind] += float((smooth - weight).norm() / weight.norm()) / draws
    assert tails == pytest.approx({"plain": 0.334, "d1": 0.217, "d2": 0.148}, abs=0.06)
    assert all(0.5 < share < 0.7 for share in moved.values())
    weight = random_matrix(12, 9)
    assert tail(shrink(weight, 0.2 * float(weight.norm())), 3) < tail(weight, 3)
