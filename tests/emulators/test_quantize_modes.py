"""Modes and options of quantize: the paper's rounding without saved bytes, and what can't be asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.quantize import Quantize, fake_quantized
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError

from .conftest import make_context, untouched

Pico = Callable[..., nn.Module]


def legacy(weight: Tensor, bits: int) -> Tensor:
    """``zp = (max + min) / 2``, ``s = (max - min) / (2^b - 1)``, ``round((w - zp) / s) * s + zp``."""
    zp, s = (weight.max() + weight.min()) / 2, (weight.max() - weight.min()) / (2**bits - 1)
    return torch.round((weight - zp) / s) * s + zp


@pytest.mark.parametrize("bits", range(1, 9))
def test_legacy_is_the_papers_formula(bits: int, pico: Pico) -> None:
    """Of every tensor with more than one dimension, Conv1D's too; nothing else changes and no bytes are saved."""
    context = make_context(pico("gpt2"))
    built = Quantize(bits, mode="legacy-fake").compress(start(context), context)
    own = dict(context.block(2).named_parameters())
    for name, tensor in built.at(2).named_parameters():
        if tensor.ndim > 1:
            assert_close(tensor, legacy(own[name].detach(), bits), rtol=1e-6, atol=1e-6, check_device=False)
            assert len(tensor.unique()) <= 2**bits + 1
        else:
            assert tensor is own[name]
    assert emulator_bytes(built) == emulator_bytes(start(context))
    assert len(built.notes) == 1 and "no bytes are saved" in built.notes[0]


def test_legacy_with_one_bit_is_a_constant_and_with_8_has_257_levels() -> None:
    """The zero point is mid-range, so the ends lie half a level off: 255 steps reach from -127.5 to 127.5."""
    weight = torch.linspace(-127.5, 127.5, 511).view(7, 73)
    assert fake_quantized(weight + 3, 1).unique().tolist() == [3.0]
    assert fake_quantized(weight, 8).unique().tolist() == [float(v) for v in range(-128, 129)]
    assert torch.equal(fake_quantized(torch.full((2, 2), 0.3), 4), torch.full((2, 2), 0.3))


@pytest.mark.parametrize("mode", ["packed", "legacy-fake"])
def test_modes_in_every_family(pico: Pico, family: str, mode: str) -> None:
    context = make_context(pico(family))
    method = parse_emulator(f"quantize:mode={mode},bits=4")
    assert parse_emulator(str(method)) == method
    with untouched(context.model):
        built = method.compress(start(context), context)
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(emulated_network(built, context)(input_ids=ids).logits).all())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quantize:mode=legacy-fake,bits=0", "legacy-fake takes 1 to 8"),
        ("quantize:mode=legacy-fake,bits=9", "legacy-fake takes 1 to 8"),
        ("quantize:mode=legacy-fake,keep=0.5", "leave out keep and bytes"),
        ("quantize:mode=legacy-fake,bytes=3MB", "leave out keep and bytes"),
        ("quantize:mode=legacy", "did you mean 'legacy-fake'"),
        ("quantize:bits=3", "8 or 4 bits"),
        ("quantize:keep=0", "must be a share above 0"),
        ("quantize:keep=1.5", "must be a share above 0"),
        ("quantize:bytes=0", "must be above 0"),
    ],
)
def test_impossible_options(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_emulator(spec)


@pytest.mark.parametrize("spec", ["quantize:keep=0.3", "quantize:group=32,bytes=3MB", "quantize"])
def test_options_and_back(spec: str) -> None:
    assert str(parse_emulator(spec)) == spec
    assert parse_emulator("quantize:keep=") == Quantize()


def test_legacy_behind_packed_is_refused(pico_llama: nn.Module) -> None:
    context = make_context(pico_llama)
    with pytest.raises(EmulatorError, match="8-bit weights already"):
        parse_emulator("quantize+quantize:mode=legacy-fake").compress(start(context), context)
