"""The closed form for MLP channels against the dense ``||G D A||_1 - lam * g . D`` of every matrix of the MLP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from offsite_fl.emulators.channel_choice import channel_candidates
from offsite_fl.emulators.channels import ChannelChain, channel_norms
from offsite_fl.emulators.gcs import Scale
from offsite_fl.emulators.kfac import Moments
from offsite_fl.models.linears import linear_weight

LAM, HIDDEN, WIDTH = 0.4, 4, 7
GATED = ChannelChain(("gate", "up"), "down", WIDTH)
PLAIN = ChannelChain(("up",), "down", WIDTH)
FUSED = ChannelChain(("both",), "down", WIDTH, 2)


def gated_block() -> nn.ModuleDict:
    torch.manual_seed(0)
    sizes = {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def moments_of(gated: bool = True) -> dict[str, Moments]:
    """Of gate and up, which read the same, and of down."""
    generator = torch.Generator().manual_seed(1)
    x, inner = torch.randn(30, HIDDEN, generator=generator), torch.randn(30, WIDTH, generator=generator)
    seen = {}
    for name, given, out in (("gate", x, WIDTH), ("up", x, WIDTH), ("down", inner, HIDDEN)):
        gy = torch.randn(30, out, generator=generator)
        seen[name] = Moments(given.T @ given / 30, gy.T @ gy / 30, gy.T @ given / 30)
    return seen if gated else {name: m for name, m in seen.items() if name != "gate"}


def dense_score(block: nn.Module, seen: dict[str, Moments], dropped: list[int]) -> float:
    """The score of zeroing rows of every reader and columns of the writer, matrix by matrix in fp64."""
    total = 0.0
    for name, moments in seen.items():
        weight = linear_weight(block.get_submodule(name)).detach().double()
        change = torch.zeros_like(weight)
        if name == "down":
            change[:, dropped] = -weight[:, dropped]
        else:
            change[dropped] = -weight[dropped]
        shifted = moments.outputs.double() @ change @ moments.inputs.double()
        total += float(shifted.abs().sum() - LAM * (moments.gradient.double() * change).sum())
    return total


def as_parts(seen: dict[str, Moments]) -> dict[str, tuple[Moments, ...]]:
    return {name: (moments,) for name, moments in seen.items()}


@pytest.mark.parametrize("chain", [GATED, PLAIN])
def test_one_channel_is_exact_and_many_are_bounded(chain: ChannelChain) -> None:
    block, seen = gated_block(), moments_of(chain is GATED)
    candidates = channel_candidates(block, chain, as_parts(seen))
    scores = candidates.terms().scores(Scale(LAM))
    assert len(scores) == WIDTH
    for channel in range(WIDTH):
        assert float(scores[channel]) == pytest.approx(dense_score(block, seen, [channel]), rel=1e-4)
    for dropped in ([0, 1], [2, 4, 6], list(range(WIDTH))):
        joint = dense_score(block, seen, dropped)
        assert candidates.joint_score(torch.tensor(dropped), Scale(LAM)) == pytest.approx(joint, rel=1e-4)
        assert float(scores[dropped].sum()) >= joint - 1e-4 * abs(joint)


def test_a_fused_gate_and_up_costs_what_the_two_cost() -> None:
    block, seen = gated_block(), moments_of()
    fused = nn.ModuleDict({"both": nn.Linear(HIDDEN, 2 * WIDTH), "down": block["down"]})
    fused["both"].weight.data = torch.cat([block["gate"].weight, block["up"].weight]).detach()
    ours = channel_candidates(fused, FUSED, {"both": (seen["gate"], seen["up"]), "down": (seen["down"],)})
    theirs = channel_candidates(block, GATED, as_parts(seen))
    assert_close(ours.terms().shifts, theirs.terms().shifts)
    assert_close(ours.slopes, theirs.slopes)
    assert_close(channel_norms(fused, FUSED), channel_norms(block, GATED))


def test_conv1d_counts_in_its_own_orientation() -> None:
    block, seen = gated_block(), moments_of(False)
    stored = nn.ModuleDict({"up": Conv1D(WIDTH, HIDDEN), "down": Conv1D(HIDDEN, WIDTH)})
    for name in ("up", "down"):
        stored[name].weight.data = block[name].weight.detach().T.clone()
    ours, theirs = (channel_candidates(b, PLAIN, as_parts(seen)) for b in (stored, block))
    assert_close(ours.terms().shifts, theirs.terms().shifts)
    assert_close(ours.slopes, theirs.slopes)


def test_norms_by_hand() -> None:
    block = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 1)})
    block["up"].weight.data = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    block["down"].weight.data = torch.tensor([[2.0, 4.0]])
    expected: Tensor = torch.tensor([3.0, 5.0])
    assert_close(channel_norms(block, ChannelChain(("up",), "down", 2)), expected)
