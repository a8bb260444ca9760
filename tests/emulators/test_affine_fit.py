"""The change to an affine map against numpy's least squares on the tokens themselves, and against slow searches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from offsite_fl.emulators.affine_fit import AffineFit
from offsite_fl.errors import EmulatorError

INPUTS, OUTPUTS, TOKENS = 5, 4, 60


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of uneven size with a mean, and what is missing: partly explained by them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, INPUTS, generator=generator).double() * torch.tensor([3.0, 1, 1, 0.5, 0.1]) + 2
    map_ = torch.randn(OUTPUTS, INPUTS, generator=generator).double()
    return x, x @ map_.T + torch.randn(TOKENS, OUTPUTS, generator=generator).double() - 1


def fitted(x: Tensor, missing: Tensor, ridge: float, rank: int | None = None, parts: int = 1) -> tuple[Tensor, Tensor]:
    fit = AffineFit(x.shape[1], missing.shape[1], x.device)
    for some_x, some_missing in zip(x.chunk(parts), missing.chunk(parts), strict=True):
        fit.add(some_x, some_missing)
    return fit.change(ridge, rank, "here")


def level(x: Tensor) -> float:
    """The mean over inputs of the squared distances to their means."""
    return float((x - x.mean(0)).square().sum(0).mean())


def objective(x: Tensor, missing: Tensor, ridge: float, change: Tensor, shift: Tensor) -> float:
    error = float((missing - x @ change.T - shift).square().sum())
    return error + ridge * level(x) * float(change.square().sum())


def test_without_ridge_it_is_least_squares() -> None:
    x, missing = drawn()
    change, shift = fitted(x, missing, 1e-14)
    solution = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((TOKENS, 1))]), missing.numpy(), rcond=None)[0]
    assert_close(change, torch.from_numpy(solution[:-1].T))
    assert_close(shift, torch.from_numpy(solution[-1]))


@pytest.mark.parametrize("ridge", [0.01, 0.3, 5.0])
def test_ridge_is_least_squares_with_more_rows(ridge: float) -> None:
    """Rows sqrt(ridge * level) * I that ask the weight, not the bias, for nothing."""
    x, missing = drawn()
    change, shift = fitted(x, missing, ridge, parts=3)
    rows = np.hstack([x.numpy(), np.ones((TOKENS, 1))])
    more = np.hstack([math.sqrt(ridge * level(x)) * np.eye(INPUTS), np.zeros((INPUTS, 1))])
    goal = np.vstack([missing.numpy(), np.zeros((INPUTS, OUTPUTS))])
    solution = np.linalg.lstsq(np.vstack([rows, more]), goal, rcond=None)[0]
    assert_close(change, torch.from_numpy(solution[:-1].T))
    assert_close(shift, torch.from_numpy(solution[-1]))


def test_by_hand() -> None:
    """x = 1, 3 and e = 4, 10: variances sum to 2, so D = 6 / (2 + 1 * 2) = 1.5 and d = 7 - 1.5 * 2."""
    change, shift = fitted(torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [10.0]]), 1.0)
    assert change.item() == pytest.approx(1.5) and shift.item() == pytest.approx(4.0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_is_the_best_of_that_rank(rank: int) -> None:
    """Against factors found by alternating least squares on the same sum, from a random start."""
    x, missing = drawn()
    ridge = 0.2
    change, shift = fitted(x, missing, ridge, rank)
    assert int(torch.linalg.matrix_rank(change)) == rank
    rows = torch.cat([x - x.mean(0), math.sqrt(ridge * level(x)) * torch.eye(INPUTS).double()])
    goal = torch.cat([missing - missing.mean(0), torch.zeros(INPUTS, OUTPUTS).double()])
    down = torch.randn(rank, INPUTS, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(500):
        up = torch.linalg.lstsq(rows @ down.T, goal).solution.T
        # ||goal - rows down' up'|| over down, with up made orthonormal
        up = torch.linalg.qr(up).Q
        down = torch.linalg.lstsq(rows, goal @ up).solution.T
    found = up @ down
    least = objective(x, missing, ridge, found, missing.mean(0) - found @ x.mean(0))
    assert objective(x, missing, ridge, change, shift) == pytest.approx(least, rel=1e-8)
    full = objective(x, missing, ridge, *fitted(x, missing, ridge))
    assert least > full * (1 + 1e-6)


def test_a_rank_that_is_no_bound() -> None:
    x, missing = drawn()
    for a, b in zip(fitted(x, missing, 0.1, OUTPUTS), fitted(x, missing, 0.1), strict=True):
        assert torch.equal(a, b)


def test_means_match_whatever_the_ridge() -> None:
    x, missing = drawn()
    for ridge, rank in ((1e-6, None), (100.0, None), (0.1, 1)):
        change, shift = fitted(x, missing, ridge, rank)
        assert_close((missing - x @ change.T - shift).mean(0), torch.zeros(OUTPUTS).double())


def test_one_token_has_only_a_mean() -> None:
    change, shift = fitted(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 0.1)
    assert change.tolist() == [[0.0, 0.0]] and shift.tolist() == [3.0]


@pytest.mark.parametrize(("bad", "message"), [("x", "inputs of here"), ("missing", "hidden states behind here")])
def test_what_is_not_finite_is_named(bad: str, message: str) -> None:
    x, missing = drawn()
    (x if bad == "x" else missing)[3, 1] = math.inf
    with pytest.raises(EmulatorError, match=message):
        fitted(x, missing, 0.1)
