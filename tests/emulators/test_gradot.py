"""GradOT: it runs on every family, meets its budgets, chains with other methods and says what it can't do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.gradot import GradOT
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.parts import find_parts
from offsite_fl.emulators.prune import Prune
from offsite_fl.emulators.quantize import Quantize
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight

from .conftest import compressed, logits, share, untouched

MakeContext = Callable[..., Context]
MakePico = Callable[..., nn.Module]


def test_every_family(family: str, pico: MakePico, context_of: MakeContext) -> None:
    runs_on(pico(family), "gradot:keep=0.5", context_of)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_every_option(family: str, pico: MakePico, context_of: MakeContext) -> None:
    spec = "gradot:keep=0.4,lam-mha=0.2,lam-mlp=0,keep-mha=0.6,top=0.1,normalise=false,allocation=global,refine=1"
    runs_on(pico(family), spec, context_of)


def runs_on(model: nn.Module, spec: str, context_of: MakeContext) -> None:
    """The promises to every family: form, budget, the owner's model untouched, a client network that runs."""
    context = context_of(model)
    method = parse_emulator(spec)
    assert parse_emulator(str(method)) == method and isinstance(method, GradOT)
    with untouched(context.model):
        built = compressed(method, context)
    assert built.layout == start(context).layout and built.notes == ()
    assert abs(share(built, context) - method.keep) <= 0.02
    for slot, parts in find_parts(start(context), context).items():
        own, full = built.blocks[slot].module, context.block(built.blocks[slot].origin)
        for part in parts.parts:
            for path in part.paths:
                new, old = own.get_submodule(path), full.get_submodule(path)
                bias = linear_bias(old)
                if isinstance(new, LowRankLinear):
                    assert not part.in_mlp and new.rank < part.candidates
                    assert bias is None or torch.equal(new.up.bias, bias)
                elif part.in_mlp:
                    assert linear_weight(new).numel() <= linear_weight(old).numel()
    found = logits(built, context)
    assert found.shape == (4, 16, 64) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("allocation", ["matrix", "global"])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6, 0.9, 0.97])
def test_the_budget_is_met(
    keep: float, allocation: Literal["matrix", "global"], pico_llama: nn.Module, context_of: MakeContext
) -> None:
    context = context_of(pico_llama)
    built = compressed(GradOT(keep, allocation=allocation), context)
    assert abs(share(built, context) - keep) <= 0.02 * keep and built.notes == ()


def test_a_budget_in_bytes(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    asked = emulator_bytes(start(context)) // 3
    built = compressed(GradOT(bytes=str(asked)), context)
    assert abs(emulator_bytes(built) - asked) <= 0.02 * 3 * asked


def test_too_small_a_budget_is_noted(pico_llama: nn.Module, context_of: MakeContext) -> None:
    built = compressed(GradOT(0.01), context_of(pico_llama))
    assert "keeps a rank and an MLP a channel at least" in built.notes[0]


def test_keep_one_gives_the_full_block_back(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    built = compressed(GradOT(1), context)
    for block in built.blocks:
        original = context.block(block.origin)
        assert block.module is not original
        ours, theirs = block.module.state_dict(), original.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shares_of_the_two_parts(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Ranks max(1, round(s m n / (m + n))), channels ceil(s width): 32x32 and 16x32 matrices, 64 channels."""
    context = context_of(pico_llama)
    block = compressed(GradOT(keep_mha=0.4, keep_mlp=0.3), context).at(2)
    assert block.self_attn.q_proj.rank == 6 and block.self_attn.k_proj.rank == 4
    assert block.mlp.up_proj.weight.shape == (20, 32) and block.mlp.down_proj.weight.shape == (32, 20)
    # A square matrix saves only below half of its rank.
    block = compressed(GradOT(keep_mha=0.98, keep_mlp=0.3), context).at(2)
    assert isinstance(block.self_attn.q_proj, nn.Linear)
    # Where one is given the other makes up for it.
    built = compressed(GradOT(0.5, keep_mha=0.9), context)
    assert built.at(2).self_attn.q_proj.rank == 14 and built.at(2).mlp.up_proj.out_features < 26
    assert abs(share(built, context) - 0.5) <= 0.02
    whole = compressed(GradOT(0.8, keep_mha=1), context).at(2)
    assert whole.self_attn.q_proj.weight is context.block(2).self_attn.q_proj.weight


def test_a_fused_gate_and_up(pico_phi3: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_phi3)
    built = compressed(GradOT(0.5), context)
    block = built.at(3)
    assert block.mlp.gate_up_proj.out_features == 2 * block.mlp.down_proj.in_features < 60
    assert abs(share(built, context) - 0.5) <= 0.02
    assert bool(torch.isfinite(logits(built, context)).all())


def test_behind_other_methods(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    for spec, keep in (("layer-drop:keep=2+gradot:keep=0.6", 0.3), ("gradot:keep=0.5+quantize:bits=8", None)):
        built = parse_emulator(spec).compress(start(context), context)
        assert keep is None or abs(share(built, context) - keep) <= 0.01
        assert bool(torch.isfinite(logits(built, context)).all())


def test_a_dropped_place_is_scored_with_the_full_models_gradients(
    pico_llama: nn.Module, context_of: MakeContext
) -> None:
    """Blocks are alike with and without the others beside them."""
    context = context_of(pico_llama)
    dropped = LayerDrop(2).compress(start(context), context)
    method = GradOT(keep_mha=0.5, keep_mlp=0.5)
    alone, among = method.compress(dropped, context).at(4), compressed(method, context).at(4)
    assert_close(alone.state_dict(), among.state_dict())


def test_a_shared_block_is_scored_at_its_first_place(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    method = GradOT(keep_mha=0.5, keep_mlp=0.5)
    block = EmulatorBlock(context.block(2), 2)
    built = method.compress(Emulator([block], {2: 0, 3: 0, 4: 0}), context)
    assert built.layout == {2: 0, 3: 0, 4: 0} and len(built.blocks) == 1
    assert_close(built.at(4).state_dict(), compressed(method, context).at(2).state_dict())


def test_a_changed_block_keeps_its_own_weights(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Block 2 with other weights in the place of block 3: cut are its own."""
    context = context_of(pico_llama)
    built = GradOT(keep_mha=1, keep_mlp=0.5).compress(Emulator([EmulatorBlock(context.block(2), 2)], {3: 0}), context)
    rows = {tuple(row.tolist()) for row in context.block(2).mlp.up_proj.weight}
    assert all(tuple(row.tolist()) in rows for row in built.at(3).mlp.up_proj.weight)


def test_low_rank_parts_stay_and_the_rest_is_cut(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    before = LowRank(0.9, "plain", targets=("q_proj", "k_proj")).compress(start(context), context)
    built = GradOT(0.5).compress(before, context)
    assert built.at(2).self_attn.q_proj.down.weight is before.at(2).self_attn.q_proj.down.weight
    assert isinstance(built.at(2).self_attn.v_proj, LowRankLinear)
    assert abs(emulator_bytes(built) / emulator_bytes(before) - 0.5) <= 0.02


def test_what_cannot_be_cut_is_named(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    for method in (Quantize(8), LowRank(0.5, "plain")):
        with pytest.raises(EmulatorError, match=r"no dense linear in any block that it could cut.*put gradot first"):
            GradOT().compress(method.compress(start(context), context), context)
    pruned = Prune(0.7, heads=False).compress(start(context), context)
    with pytest.raises(EmulatorError, match=r"mlp\.\w+ of emulator block 0 is .* has one of 64x32 at this place"):
        GradOT().compress(pruned, context)
    # Without gradients there is nothing that has to fit.
    assert GradOT(score="magnitude").compress(pruned, context).notes == ()


def test_text_is_needed_but_for_the_controls(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="gradot needs calibration text"):
        compressed(GradOT(), context)
    assert abs(share(compressed(GradOT(score="random"), context), context) - 0.5) <= 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam_mha": -0.1}, "lam_mha = -0.1 must be at least 0"),
        ({"lam_mlp": -1.0}, "lam_mlp = -1.0 must be at least 0"),
        ({"keep_mha": 0.0}, "keep_mha = 0.0 must be a share"),
        ({"keep_mlp": 1.5}, "keep_mlp = 1.5 must be a share"),
        ({"keep_mha": 0.5, "keep_mlp": 0.5, "bytes": "1MB"}, "bytes say nothing"),
        ({"top": 1.1}, "top = 1.1 must be a share"),
        ({"refine": 3}, "refine = 3 must be 0, 1 or 2"),
        ({"refine": 1, "score": "random"}, "refine lowers the score gcs, not random"),
        ({"tokens": 0}, "tokens = 0 must be at least 1"),
        ({"allocation": "local"}, "local"),
        ({"score": "best"}, "best"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradOT(**options)


def test_half_precision(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.bfloat16())
    built = compressed(GradOT(0.5), context)
    assert all(parameter.dtype == torch.bfloat16 for block in built.blocks for parameter in block.module.parameters())
    assert abs(share(built, context) - 0.5) <= 0.02
