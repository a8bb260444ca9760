"""The closed form for singular directions against the dense ``||G D A||_1 - lam * g . D``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from offsite_fl.emulators.gcs import Scale
from offsite_fl.emulators.kfac import Moments
from offsite_fl.emulators.rank_choice import directions_of, keep_ranks, rank_candidates
from offsite_fl.models.linears import LowRankLinear, linear_weight

LAM = 0.3


def random_moments(rows: int, columns: int, seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x, gy = torch.randn(30, columns, generator=generator), torch.randn(30, rows, generator=generator)
    return Moments(x.T @ x / 30, gy.T @ gy / 30, gy.T @ x / 30)


def dense_score(change: Tensor, moments: Moments, lam: float = LAM) -> float:
    """``||G D A||_1 - lam * <g, D>`` entry by entry in fp64."""
    outputs, inputs, gradient = (t.double() for t in (moments.outputs, moments.inputs, moments.gradient))
    return float((outputs @ change @ inputs).abs().sum() - lam * (gradient * change).sum())


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (4, 9), (9, 4)])
def test_one_direction_is_exact_and_many_are_bounded(rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    linear, moments = nn.Linear(columns, rows), random_moments(rows, columns, 1)
    u, s, vt = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    candidates = rank_candidates(directions_of(linear), moments)
    scores = candidates.terms().scores(Scale(LAM))
    assert len(scores) == min(rows, columns)
    for k in range(len(scores)):
        assert float(scores[k]) == pytest.approx(dense_score(-s[k] * torch.outer(u[:, k], vt[k]), moments), rel=1e-4)
    for dropped in ([0, 1], [1, 3], list(range(len(scores)))):
        joint = dense_score(-(u[:, dropped] * s[dropped]) @ vt[dropped], moments)
        assert candidates.joint_score(torch.tensor(dropped), Scale(LAM)) == pytest.approx(joint, rel=1e-4)
        assert float(scores[dropped].sum()) >= joint - 1e-4 * abs(joint)


def test_a_direction_whose_loss_raises_the_loss_goes_first() -> None:
    """Two directions alike for the gradient; dropping the second raises the loss: u'gv < 0 there."""
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
    eye = torch.eye(2)
    moments = Moments(eye, torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([1.0, -2.0])))
    terms = rank_candidates(directions_of(linear), moments).terms()
    assert_close(terms.shifts, torch.tensor([2.0, 2.0]))
    assert_close(terms.slopes, torch.tensor([2.0, -2.0]))
    assert terms.scores(Scale(0.1)).argmin() == 1


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_kept_directions_become_factors(kind: str) -> None:
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(6, 4) if kind == "linear" else Conv1D(4, 6)
    linear.bias.data.normal_()
    block = nn.ModuleDict({"inner": nn.ModuleDict({"q": linear})}).bfloat16().eval()
    exact = linear_weight(linear).detach().double()
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    keep_ranks(block, "inner.q", directions_of(linear), torch.tensor([0, 2]))
    new = block.get_submodule("inner.q")
    assert isinstance(new, LowRankLinear) and new.rank == 2 and not new.training
    assert new.down.weight.dtype == torch.bfloat16 and torch.equal(new.up.bias, linear.bias)
    product = new.up.weight.double() @ new.down.weight.double()
    assert_close(product, (u[:, [0, 2]] * s[[0, 2]]) @ vt[[0, 2]], rtol=0.02, atol=0.02)
    assert_close(new.up.weight.double().norm(dim=0), new.down.weight.double().norm(dim=1), rtol=0.02, atol=0.0)
