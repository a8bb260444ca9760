"""The method smooth: every family, its budgets and options, chains, and blocks of a vision model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.budget import TOLERANCE, emulator_bytes
from offsite_fl.emulators.channels import find_chains
from offsite_fl.emulators.groups import dense_linears, plan_block
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.penalty_choice import choose_penalties, has_differences, kinds_of
from offsite_fl.emulators.rank_rules import cut_to
from offsite_fl.emulators.reorder import reorder
from offsite_fl.emulators.smooth import Smooth
from offsite_fl.emulators.smooth_prox import proximal
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight
from offsite_fl.models.walk import BlockCall

from .conftest import logits, untouched

MakeContext = Callable[..., Context]


SPECS = (
    "smooth:lam=0.01,rank=energy",
    "smooth:lam=0.1,dim=both,weighted=true",
    "smooth:mode=train,attention=d1,mlp=d2,norm=l1,steps=2,eval-every=2",
)


@pytest.mark.parametrize("spec", SPECS)
def test_every_family(spec: str, family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    method = parse_emulator(spec)
    assert parse_emulator(str(method)) == method
    context = context_of(pico(family))
    with untouched(context.model):
        built = method.compress(start(context), context)
    whole = emulator_bytes(start(context))
    if built.notes:
        assert len(built.notes) == 1 and "smooth was asked for 50.0% of the bytes" in built.notes[0]
        assert abs(emulator_bytes(built) - whole / 2) > TOLERANCE * whole / 2
    assert 0 <= whole / 2 - emulator_bytes(built) < 0.05 * whole
    for block in built.blocks:
        for path, linear in dense_linears(context.block(block.origin)):
            new, bias = block.module.get_submodule(path), linear_bias(linear)
            if isinstance(new, LowRankLinear) and bias is not None and "train" not in spec:
                assert_close(new.up.bias.sort().values, bias.sort().values)  # an MLP's outputs may have moved
    found = logits(built, context)
    assert found.shape == (4, 16, 64) and bool(torch.isfinite(found).all())


def test_budgets_in_bytes(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = Smooth(bytes="70000", rank="energy").compress(start(context), context)
    assert built.notes == () and 0 <= 70_000 - emulator_bytes(built) < TOLERANCE * 70_000
    tiny = Smooth(bytes="1KB").compress(start(context), context)
    assert "ranks are whole" in tiny.notes[0]


def held(emulator: Emulator) -> int:
    """Bytes of all tensors, by hand."""
    return sum(tensor.nbytes for block in emulator.blocks for tensor in block.module.state_dict().values())


def most_at_one_share(emulator: Emulator, budget: float) -> int:
    """The most within ``budget`` at r = floor(share m n / (m + n)) for all, of all shares where an r changes."""
    shapes = [
        tuple(linear_weight(linear).shape) for block in emulator.blocks for _, linear in dense_linears(block.module)
    ]
    rest = held(emulator) - sum(4 * m * n for m, n in shapes)
    shares = {Fraction(r * (m + n), m * n) for m, n in shapes for r in range(1, m * n // (m + n) + 1)}
    sizes = [
        rest + sum(4 * (m + n) * max(1, share * m * n // (m + n)) for m, n in shapes) for share in shares if share < 1
    ]
    return int(max(size for size in sizes if size <= budget))


@pytest.mark.parametrize("mode", ["prox", "train"])
@pytest.mark.parametrize("keep", [0.8, 0.64, 0.5, 0.4, 0.3, 0.15])
def test_budgets_in_both_modes(keep: float, mode: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Within 2 % by energy. One share for all has a coarser grain: it takes what fits, and says where it misses."""
    context = context_of(pico_llama)
    method, given = Smooth(keep, mode, steps=2, eval_every=2), start(context)  # type: ignore[arg-type]
    budget, tolerance = keep * held(given), 0.02 * keep * held(given)
    by_energy = replace(method, rank="energy").compress(given, context)
    assert 0 <= budget - held(by_energy) < tolerance and by_energy.notes == ()
    by_share = method.compress(given, context)
    assert held(by_share) == most_at_one_share(given, budget)
    assert bool(by_share.notes) == (budget - held(by_share) > tolerance)


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "keep"),
        ({"lam": -1.0}, "lam = -1.0 can't be negative"),
        ({"mode": "fast"}, "mode"),
        ({"attention": "nuc/d1"}, "attention=nuc/d1 has no closed form.*mode=train"),
        ({"mlp": "nuc/d1/d2"}, "mlp=nuc/d1/d2 has no closed form"),
        ({"mlp": "d2/nuc"}, "mlp = 'd2/nuc' isn't possible; did you mean.*'nuc/d2'"),
        ({"norm": "l1"}, "norm=l1 has no closed form"),
        ({"mode": "train", "weighted": True}, "weighted=true"),
        ({"mode": "train", "steps": 0}, "steps"),
        ({"mode": "train", "eval_every": 0}, "eval_every"),
        ({"mode": "train", "lr": 0.0}, "lr"),
        ({"mode": "train", "w_kd": -1.0}, "w_kd"),
        ({"mode": "train", "w_lm": 0.0, "w_kd": 0.0}, "both 0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Smooth(**options)


def test_defaults_by_mode() -> None:
    """methods.md 5.4: in one shot nuc on attention and d2 on the MLP."""
    prox, train = Smooth(), Smooth(mode="train")
    assert (prox.rules.attention, prox.rules.mlp, prox.rules.anywhere) == ("nuc", "d2", False)
    assert (train.rules.mlp, train.rules.anywhere) == ("nuc", True)
    assert prox.strength in (1e-4, 1e-3, 1e-2) and prox.strength < train.strength
    assert Smooth(lam=0.0).strength == 0


# What comes in


@pytest.mark.parametrize(
    "spec",
    [
        "layer-drop:keep=3+smooth:keep=0.5",
        "smooth:keep=0.5+quantize:bits=8",
        "smooth:keep=0.5+smooth:keep=0.9",
        "layer-drop:keep=2+smooth:mode=train,steps=2,eval-every=2+quantize:bits=8",
        "prune:keep=0.7+smooth:keep=0.5,lam=0.1",
    ],
)
def test_chains(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = parse_emulator(spec).compress(start(context), context)
    assert bool(torch.isfinite(logits(built, context)).all())


def test_shared_blocks_are_cut_once(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    given = Emulator([EmulatorBlock(context.block(i), i) for i in (1, 4)], {1: 0, 3: 0, 4: 1})
    for method in (Smooth(weighted=True), Smooth(mode="train", steps=2, eval_every=2)):
        built = method.compress(given, context)
        assert built.layout == given.layout and [b.origin for b in built.blocks] == [1, 4]
        assert bool(torch.isfinite(logits(built, context)).all())


def test_packed_linears_stay_in_one_shot_and_are_refused_in_training(
    pico_llama: nn.Module, context_of: MakeContext
) -> None:
    context = context_of(pico_llama)
    packed = parse_emulator("quantize:bits=8").compress(start(context), context)
    again = Smooth().compress(packed, context)
    assert all(torch.equal(a, b) for a, b in zip(packed.at(2).buffers(), again.at(2).buffers(), strict=True))
    assert "what isn't a dense linear stays" in again.notes[0]
    with pytest.raises(EmulatorError, match="put quantize last, as in 'smooth"):
        Smooth(mode="train").compress(packed, context)
    factors = LowRank(mode="plain").compress(start(context), context)
    with pytest.raises(EmulatorError, match="no dense linear is left to cut"):
        Smooth(mode="train").compress(factors, context)


def test_blocks_without_free_channels_are_named(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """With down in two factors already, gate and up write channels that no dense linear reads."""
    context = context_of(pico_llama)
    first = LowRank(0.9, "plain", targets=("down_proj",)).compress(start(context), context)
    built = Smooth(0.5).compress(first, context)
    assert "no MLP channels whose order is free in 4 of 4 blocks" in built.notes[0]
    assert all("free" not in note for note in Smooth(0.5, mlp="nuc").compress(first, context).notes)


def test_blocks_without_free_values_are_named(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """GPT-2's heads aren't found; a LLaMA's are. Without reordering attention's values nobody looks for them."""
    for family, count in (("gpt2", 1), ("llama", 0)):
        context = context_of(pico(family), calibration=())
        built = Smooth(0.5, attention="d1", rank="energy").compress(start(context), context)
        assert sum("no values whose order is free" in note for note in built.notes) == count
    context = context_of(pico("gpt2"), calibration=())
    assert Smooth(0.5, rank="energy").compress(start(context), context).notes == ()


@pytest.mark.parametrize(
    "spec", ["smooth:attention=nuc/d1,mlp=nuc/d2,mode=train", "smooth:attention=d1/d2,mlp=d1/d2,dim=both"]
)
def test_several_penalties_in_a_spec(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    method = parse_emulator(f"{spec},steps=2,eval-every=2")
    assert isinstance(method, Smooth) and parse_emulator(str(method)) == method
    assert has_differences(method.attention) and len(kinds_of(method.rules.mlp)) == 2
    context = context_of(pico_llama)
    assert bool(torch.isfinite(logits(method.compress(start(context), context), context)).all())


def test_progress_is_shown_when_asked_for(
    pico_llama: nn.Module, context_of: MakeContext, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(pico_llama)
    Smooth().compress(start(context), context)
    assert capsys.readouterr().out == ""
    context = context_of(pico_llama, progress=True)
    Smooth(rank="energy").compress(start(context), context)
    Smooth(weighted=True, mlp="nuc").compress(start(context), context)
    Smooth(mode="train", steps=2, eval_every=2).compress(start(context), context)
    out = capsys.readouterr().out
    assert all(part in out for part in ("smooth: spectra", "smooth prox", "2/2"))


# A vision model


def vision_model() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_the_blocks_of_a_vision_model(lam: float) -> None:
    """The same parts of the method on a ViT's block: channels found, reordered without a trace, smoothed and cut."""
    model = vision_model()
    block = copy.deepcopy(block_list(model, find_blocks(model))[1])
    hidden = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1))
    plan = plan_block(block, hidden, BlockCall(), lambda x: x.reshape(-1, x.shape[-1]))
    (chain,) = find_chains(block, hidden, BlockCall(), plan)
    assert chain.width == 64
    with torch.no_grad():
        before = block(hidden)
        reorder(block, chain, ("out",))
        assert_close(block(hidden), before, rtol=1e-4, atol=1e-5)
        penalties = choose_penalties(block, (chain,), Smooth(lam=lam).rules)
        assert [p.kind for p in penalties[chain.readers[0]]] == ["d2"] and len(penalties) == 6
        for path, linear in list(dense_linears(block)):
            full = min(linear_weight(linear).shape)
            cut_to(block, path, proximal(linear_weight(linear).detach(), penalties[path], lam), full)
        error = float((block(hidden) - before).norm() / before.norm())
    assert error < 1e-4 if lam == 0 else 0.01 < error < 0.5


def test_a_vision_model_in_one_shot() -> None:
    """By the nuclear norm alone nothing has to run, so a model without text is compressed as any other."""
    model = vision_model()
    blocks = find_blocks(model)
    context = Context(model, blocks, (0, 3), (1, 2))
    built = Smooth(0.7, mlp="nuc", rank="energy", lam=0.0).compress(start(context), context)
    given = emulator_bytes(start(context))
    assert built.notes == () and abs(emulator_bytes(built) - 0.7 * given) <= TOLERANCE * 0.7 * given
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(pixel_values=images).logits
        for position in (1, 2):
            block_list(model, blocks)[position] = built.at(position)
        emulated = model(pixel_values=images).logits
    assert 0 < float((emulated - full).norm()) < float(full.norm())
