"""The algebra against singular value decompositions and normal equations written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from offsite_fl.emulators.factor import PANEL, Refit, cut_linear, gram, project, rank_for
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import LowRankLinear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


SHAPES = [(7, 12), (12, 7), (9, 9)]


@pytest.mark.parametrize(
    ("keep", "rows", "columns", "rank"),
    [
        (0.5, 576, 576, 144),
        (0.5, 1536, 576, 209),  # 884,736 / 2,112 = 418.9; half of it 209.45
        (0.4, 2048, 2048, 409),  # 409.6
        (0.1, 4, 4, 1),  # 0.2: at least one direction
        (0.29, 200, 200, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (1.0, 576, 576, None),
        (0.5, 2, 2, None),  # rank 1 takes 4 numbers, as the matrix does
        (0.9, 1, 50, None),
    ],
)
def test_rank(keep: float, rows: int, columns: int, rank: int | None) -> None:
    assert rank_for(keep, rows, columns) == rank


@pytest.mark.parametrize("width", [5, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_gram(width: int) -> None:
    x = random(30, width).float()
    assert_close(gram(x), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert_close(gram(x), gram(x).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_moments_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    up, down = project(weight, None, 3)
    assert up.shape == (shape[0], 3) and down.shape == (3, shape[1])
    assert_close(up @ down, truncated(weight, 3))
    # sqrt(S) on both sides
    singular = torch.linalg.svdvals(weight)[:3].sqrt()
    assert_close(up.norm(dim=0), singular)
    assert_close(down.norm(dim=1), singular)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_moments_it_is_the_direct_minimum(shape: tuple[int, int]) -> None:
    """min ||(W - W') C^1/2|| by whitening: truncate W C^1/2, then take C^1/2 off again."""
    weight, x = random(*shape), random(40, shape[1], seed=1) * torch.logspace(0, 2, shape[1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(x.T @ x)
    root = vectors * values.sqrt() @ vectors.T
    up, down = project(weight, x.T @ x, 4)
    assert_close(up @ down, truncated(weight @ root, 4) @ torch.linalg.inv(root), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_inputs(shape: tuple[int, int]) -> None:
    """Singular moments: what the tokens see of the weight is kept whole as soon as the rank reaches their number."""
    weight, x = random(*shape), random(3, shape[1], seed=1)
    up, down = project(weight, x.T @ x, 3)
    assert_close(x @ (up @ down).T, x @ weight.T)


def test_identity_inputs_and_no_ridge_give_the_truncated_svd() -> None:
    """Whatever the target, X = I: B is the target itself."""
    weight, target = random(8, 6), random(8, 6, seed=1)
    x = torch.eye(6, dtype=torch.float64)
    up, down = Refit(x.T @ x, 1e-12, "here").factors(weight, (target.T - x @ weight.T).T @ x, 2)
    assert_close(up @ down, truncated(target, 2), rtol=1e-6, atol=1e-8)


def test_refit_is_ridge_regression_towards_the_weight() -> None:
    """The same as least squares with rows sqrt(penalty) * I appended that ask for the old weight."""
    weight, x, y = random(5, 7), random(30, 7, seed=1), random(30, 5, seed=2)
    penalty = 0.3 * (x * x).sum(0).mean()
    rows = torch.cat([x, penalty.sqrt() * torch.eye(7, dtype=torch.float64)])
    wanted = torch.cat([y, penalty.sqrt() * weight.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert_close(Refit(x.T @ x, 0.3, "here").solve(weight, (y - x @ weight.T).T @ x), expected)


def test_nothing_wrong_nothing_changed() -> None:
    weight, x = random(5, 7), random(30, 7, seed=1)
    refit = Refit(x.T @ x, 0.01, "here")
    assert torch.equal(refit.solve(weight, torch.zeros(5, 7, dtype=torch.float64)), weight)
    assert refit.solve(weight, None) is weight


def test_inputs_that_are_all_zero_fall_back_to_the_svd() -> None:
    weight = random(5, 7)
    up, down = Refit(torch.zeros(7, 7, dtype=torch.float64), 0.01, "here").factors(weight, random(5, 7), 2)
    assert_close(up @ down, truncated(weight, 2))


def test_a_zero_weight_gives_zero_factors() -> None:
    up, down = project(torch.zeros(5, 7, dtype=torch.float64), None, 2)
    assert torch.equal(up @ down, torch.zeros(5, 7, dtype=torch.float64))


def test_what_is_wrong_with_the_inputs_is_said() -> None:
    with pytest.raises(EmulatorError, match=r"inputs of q_proj in block 3 aren't finite"):
        Refit(torch.full((2, 2), torch.inf, dtype=torch.float64), 0.01, "q_proj in block 3")
    nearly_singular = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(EmulatorError, match=r"ridge = 0.01 is too small .* q_proj in block 3"):
        Refit(nearly_singular, 0.01, "q_proj in block 3")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_cut_linear_keeps_bias_dtype_and_orientation(kind: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20) if kind == "linear" else Conv1D(20, 12)
    nn.init.normal_(linear.bias)
    block = nn.ModuleDict({"part": linear.bfloat16()}).eval()
    x = torch.randn(5, 12).bfloat16()
    before = linear(x).detach()
    cut_linear(block, "part", 0.99)
    new = block["part"]
    assert isinstance(new, LowRankLinear) and new.rank == 7 and not new.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in new.parameters())
    assert float((new(x) - before).norm() / before.norm()) < 0.5
    assert torch.equal(new.up.bias, linear.bias)


def test_cut_linear_leaves_what_it_would_not_shrink() -> None:
    block = nn.ModuleDict({"part": nn.Linear(2, 2)})
    linear = block["part"]
    cut_linear(block, "part", 0.5)
    assert block["part"] is linear
