"""Adapter gradients through an emulator against those on the full model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, start
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.plug import adapter_tensors

MakeContext = Callable[..., Context]


def test_the_uncompressed_middle_matches(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    context = context_of(pico(family))
    full = full_gradients(context, context.calibration)
    ours = emulator_gradients(start(context), context, context.calibration)
    assert ours.keys() == full.keys()
    match = match_gradients(ours, full)
    assert match.cosine_by_block == pytest.approx((1, 1), abs=1e-4)
    assert match.norm_ratio_by_block == pytest.approx((1, 1), abs=1e-4)


def test_against_a_difference_quotient(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """The gradient of the mean loss along itself, with the batches' unequal numbers of tokens."""
    context = context_of(pico_llama.double())
    full = full_gradients(context, context.calibration)
    live = adapter_tensors(context.model, context.blocks, context.adapter)
    step = 1e-4
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in live.items():
                parameter += sign * step * full[name]
            losses.append(evaluate_loss(context.model, context.calibration).loss)
            for name, parameter in live.items():
                parameter -= sign * step * full[name]
    slope = (losses[0] - losses[1]) / (2 * step)
    assert_close(slope, float(sum(g.double().square().sum() for g in full.values())), rtol=1e-3, atol=1e-6)


def test_dropping_blocks_turns_the_gradient(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    full = full_gradients(context, context.calibration)
    match = match_gradients(
        emulator_gradients(LayerDrop(2).compress(start(context), context), context, context.calibration), full
    )
    assert match.cosine < 0.99


def test_by_hand() -> None:
    full = {"adapter.0.a": torch.tensor([3.0]), "adapter.0.b": torch.tensor([4.0]), "adapter.1.a": torch.tensor([1.0])}
    ours = {"adapter.0.a": torch.tensor([4.0]), "adapter.0.b": torch.tensor([3.0]), "adapter.1.a": torch.tensor([-2.0])}
    match = match_gradients(ours, full)
    assert match.cosine_by_block == pytest.approx((24 / 25, -1))
    assert match.norm_ratio_by_block == pytest.approx((1, 2))
    assert match.cosine == pytest.approx(22 / math.sqrt(29 * 26))
    assert match.norm_ratio == pytest.approx(math.sqrt(29 / 26))


def test_ten_adapter_blocks_stand_in_order() -> None:
    full = {f"adapter.{slot}.w": torch.tensor([1.0]) for slot in range(11)}
    ours = {f"adapter.{slot}.w": torch.tensor([float(slot + 1)]) for slot in range(11)}
    assert match_gradients(ours, full).norm_ratio_by_block == tuple(float(n + 1) for n in range(11))


def test_nothing_is_left_behind(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    before = {name: (p.clone(), p.requires_grad) for name, p in pico_llama.named_parameters()}
    full_gradients(context, context.calibration)
    emulator_gradients(start(context), context, context.calibration)
    for name, parameter in pico_llama.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_text_is_needed(pico_llama: nn.Module, context_of: MakeContext) -> None:
    with pytest.raises(EmulatorError, match="give calibration text"):
        full_gradients(context_of(pico_llama), ())
