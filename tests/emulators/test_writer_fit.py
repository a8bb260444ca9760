"""Which linears write to the stream in every family, factors included, and the re-fit of a single one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, start
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.streams import Stream, read_batches, working_copy
from offsite_fl.emulators.writer_fit import WriterFit, refit_writer, states_behind, stream_writers
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import LowRankLinear

MakeContext = Callable[..., Context]
Pico = Callable[..., nn.Module]

WRITERS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gemma2": (),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
}
LLAMA = ("self_attn.o_proj", "mlp.down_proj")


def entering(context: Context) -> Stream:
    return Stream.entering(read_batches(context, context.calibration))


@pytest.mark.parametrize("factored", [False, True])
def test_writers_of_every_family(family: str, factored: bool, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family))
    emulator = start(context)
    if factored:
        emulator = LowRank(mode="plain").compress(emulator, context)
        assert all(isinstance(emulator.at(2).get_submodule(p), LowRankLinear) for p in WRITERS.get(family, LLAMA))
    found = stream_writers(working_copy(emulator.at(2), "cpu"), entering(context), 2)
    assert found == WRITERS.get(family, LLAMA)


def test_a_harmonizer_writes_with_its_second_linear(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    block = Harmonizer.replacing(context.block(2), 32, 4)
    nn.init.normal_(block.up.weight)  # type: ignore[arg-type]
    assert stream_writers(block, entering(context), 2) == ("up",)


def test_states_behind_a_writer(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Behind attention: the block's output without its MLP; behind the MLP: the block's output."""
    context = context_of(pico_llama)
    stream, block = entering(context), working_copy(context.block(2), "cpu")
    whole = stream.through(block, 2)
    without = copy.deepcopy(block)
    nn.init.zeros_(without.mlp.down_proj.weight)
    for writers, expected in ((LLAMA[:1], stream.through(without, 2)), (LLAMA, whole)):
        assert_close(states_behind(block, stream, 2, writers), expected.hidden)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_one_writer_reaches_what_another_weight_and_bias_gave(
    family: str, number: int, pico: Pico, context_of: MakeContext
) -> None:
    """The stream that is wanted is the block's own with another weight and bias there, so these are found."""
    context = context_of(pico(family))
    stream, block = entering(context), working_copy(context.block(2), "cpu")
    writers = WRITERS.get(family, LLAMA)[:number]
    linear, other = block.get_submodule(writers[-1]), copy.deepcopy(block)
    changed = other.get_submodule(writers[-1])
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(32, generator=generator)
    with torch.no_grad():
        changed.weight.add_(torch.randn(changed.weight.shape, generator=generator) * 0.1)
    changed.bias = nn.Parameter(bias)
    before = linear.weight.clone()
    wanted = states_behind(other, stream, 2, writers)
    refit_writer(block, stream, 2, writers, wanted, WriterFit(1e-10))
    assert_close(states_behind(block, stream, 2, writers), wanted, rtol=1e-3, atol=1e-3)
    if family != "phi":  # the channels of its MLP are too much alike to tell their weights apart
        assert_close(linear.weight, changed.weight, rtol=1e-3, atol=2e-4)
        assert_close(linear.bias, bias, rtol=1e-3, atol=2e-4)
    # the owner's own weight is another tensor
    assert torch.equal(context.block(2).get_submodule(writers[-1]).weight, before)


def test_a_share_of_the_change(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Half of the change leaves half of what was missing, weight and bias alike."""
    context = context_of(pico_llama)
    stream = entering(context)
    wanted = [state * 1.5 + 0.3 for state in stream.hidden]
    blocks = [working_copy(context.block(2), "cpu") for _ in range(3)]
    for block, share in zip(blocks[1:], (0.5, 1.0), strict=True):
        refit_writer(block, stream, 2, LLAMA, wanted, WriterFit(0.1, 3, share))
    given, half, whole = (states_behind(block, stream, 2, LLAMA)[0] for block in blocks)
    assert_close(half - given, (whole - given) / 2, rtol=1e-3, atol=1e-4)
    assert float((half - given).norm()) > 0.1
