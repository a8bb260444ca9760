"""The penalties by hand, against difference matrices, and their gradients by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from offsite_fl.emulators.penalties import Dim, Kind, Norm, Penalty, nuclear_norm, nuclear_subgradient, roughness


def random_matrix(rows: int = 6, columns: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference_matrix(count: int, order: int) -> Tensor:
    """D1 or D2 of methods.md, row by row."""
    out = torch.zeros(count - order, count, dtype=torch.float64)
    for i in range(count - order):
        for k, value in enumerate([(-1, 1), (1, -2, 1)][order - 1]):
            out[i, i + k] = value
    return out


def test_by_hand() -> None:
    """Rows (0, 1), (2, 1), (3, 5): steps (2, 0) and (1, 4), second step (-1, 4). Columns (0, 2, 3), (1, 1, 5)."""
    weight = torch.tensor([[0.0, 1.0], [2.0, 1.0], [3.0, 5.0]])
    assert roughness(weight, 1).item() == 4 + 17
    assert roughness(weight, 2).item() == 17
    assert roughness(weight, 1, norm="l1").item() == 2 + 5
    assert roughness(weight, 2, norm="l1").item() == 5
    assert roughness(weight, 1, "in").item() == 1 + 1 + 4
    assert roughness(weight, 2, "in").item() == 0


def test_no_difference_from_one_run_to_the_next() -> None:
    weight = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    assert roughness(weight, 1).item() == 1 + 81 + 4
    assert roughness(weight, 1, runs=2).item() == 1 + 4
    assert roughness(weight, 2, runs=2).item() == 0


def test_runs_count_in_the_normalised_penalty_and_only_along_outputs() -> None:
    """Rows 1, 1, -1, -1: flat within both runs, one step of 2 without them. Along inputs runs don't matter."""
    weight = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert Penalty("d1", runs=2).normalised(weight).item() == 0
    assert Penalty("d1").normalised(weight).item() == pytest.approx(4 / 4)
    assert Penalty("d1", ("in",), runs=2).normalised(weight.T).item() == pytest.approx(4 / 4)


def test_runs_of_inputs_count_along_inputs_alone() -> None:
    """The same numbers as columns: with two runs of inputs there is no step, and none of outputs in one row."""
    weight = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    assert Penalty("d1", ("in",), runs_in=2).normalised(weight).item() == 0
    assert Penalty("d1", ("in",)).normalised(weight).item() == pytest.approx(4 / 4)
    assert Penalty("d1", runs_in=2).normalised(weight.T).item() == pytest.approx(4 / 4)


@pytest.mark.parametrize("order", [1, 2])
def test_the_squares_are_those_of_the_difference_matrix(order: int) -> None:
    weight = random_matrix()
    assert_close(roughness(weight, order), (difference_matrix(6, order) @ weight).square().sum())
    assert_close(roughness(weight, order, "in"), (difference_matrix(5, order) @ weight.T).square().sum())


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_is_twice_dd_w(order: int) -> None:
    weight = random_matrix().requires_grad_()
    roughness(weight, order).backward()  # type: ignore[no-untyped-call]
    d = difference_matrix(6, order)
    assert_close(weight.grad, 2 * d.T @ d @ weight.detach())


def numeric_gradient(penalty: Penalty, weight: Tensor, unit: float, by: float = 1e-6) -> Tensor:
    """Central differences of R / unit, so with what normalises it held fixed; R from its definition."""

    def value(w: Tensor) -> float:
        if penalty.kind == "nuc":
            return float(torch.linalg.matrix_norm(w, "nuc")) / unit
        order = {"d1": 1, "d2": 2}[penalty.kind]
        total = 0.0
        for dim in penalty.dims:
            steps = difference_matrix(w.shape[dim == "in"], order) @ (w if dim == "out" else w.T)
            total += float(steps.square().sum() if penalty.norm == "l2sq" else steps.abs().sum())
        return total / unit

    out = torch.zeros_like(weight)
    for i in range(weight.numel()):
        moved = torch.zeros_like(weight)
        moved.view(-1)[i] = by
        out.view(-1)[i] = (value(weight + moved) - value(weight - moved)) / (2 * by)
    return out


@pytest.mark.parametrize("norm", ["l2sq", "l1"])
@pytest.mark.parametrize("dims", [("out",), ("in",), ("out", "in")])
@pytest.mark.parametrize("kind", ["nuc", "d1", "d2"])
def test_gradients_by_finite_differences(kind: Kind, dims: tuple[Dim, ...], norm: Norm) -> None:
    weight = random_matrix().requires_grad_()
    penalty = Penalty(kind, dims, norm)
    penalty.normalised(weight).backward()  # type: ignore[no-untyped-call]
    size = float(weight.detach().square().sum())
    unit = size**0.5 if kind == "nuc" else size if norm == "l2sq" else 30 * (size / 30) ** 0.5
    assert_close(weight.grad, numeric_gradient(penalty, weight.detach(), unit), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["l2sq", "l1"])
@pytest.mark.parametrize("kind", ["nuc", "d1", "d2"])
def test_the_unit_of_a_weight_does_not_matter(kind: Kind, norm: Norm) -> None:
    penalty = Penalty(kind, ("out", "in"), norm)
    assert_close(penalty.normalised(random_matrix() * 100), penalty.normalised(random_matrix()))


def test_at_a_mean_square_of_one_differences_are_divided_by_the_number_of_weights() -> None:
    """Entries 1 and -1: rms 1, R_1 = 4 + 0, so 4 / 3; with absolute values 2 / 3."""
    weight = torch.tensor([[1.0], [-1.0], [-1.0]])
    assert Penalty("d1").normalised(weight).item() == pytest.approx(4 / 3)
    assert Penalty("d1", norm="l1").normalised(weight).item() == pytest.approx(2 / 3)


def test_the_nuclear_norm() -> None:
    """diag(3, -4) has singular values 4 and 3, the polar factor diag(1, -1), and ||W||_F = 5."""
    weight = torch.diag(torch.tensor([3.0, -4.0]))
    assert nuclear_norm(weight).item() == pytest.approx(7)
    assert Penalty("nuc").normalised(weight).item() == pytest.approx(7 / 5)
    assert_close(nuclear_subgradient(weight), torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_subgradient_gives_the_norm_and_its_slope(shape: tuple[int, int]) -> None:
    weight, other = random_matrix(*shape), random_matrix(*shape, seed=1)
    slope = nuclear_subgradient(weight)
    assert_close((slope * weight).sum(), nuclear_norm(weight))
    assert_close(torch.linalg.svdvals(slope), torch.ones(4).double())
    assert nuclear_norm(other) >= (slope * other).sum()  # the plane through W lies below the norm everywhere


def test_directions_of_no_weight_have_no_slope() -> None:
    low = random_matrix(6, 2) @ random_matrix(2, 5, seed=1)
    assert int(torch.linalg.matrix_rank(nuclear_subgradient(low))) == 2
    assert not nuclear_subgradient(torch.zeros(3, 2)).any()


def test_the_nuclear_norm_does_not_depend_on_the_order_and_differences_do() -> None:
    weight = random_matrix().sort(0).values
    mixed = weight[[3, 0, 5, 1, 4, 2]]
    assert_close(nuclear_norm(mixed), nuclear_norm(weight))
    assert all(roughness(mixed, order) > 1.5 * roughness(weight, order) for order in (1, 2))
