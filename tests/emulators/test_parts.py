"""What can be cut in the blocks of every family: which matrices, which channels, and their bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.emulators.channels import ChannelChain, keep_channels
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.parts import find_parts
from offsite_fl.emulators.quantize import Quantize
from offsite_fl.emulators.streams import working_copy

MakeContext = Callable[..., Context]
SEPARATE = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MATRICES = {
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
    "bloom": {"self_attention.query_key_value", "self_attention.dense"},
    "gpt_neox": {"attention.query_key_value", "attention.dense"},
    "phi": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"},
}


def test_attention_by_rank_and_mlps_by_channel(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    found = find_parts(start(context), context)
    assert {slot: block.position for slot, block in found.items()} == {0: 1, 1: 2, 2: 3, 3: 4}
    for block in found.values():
        matrices = {part.target for part in block.parts if not part.in_mlp}
        (channels,) = (part for part in block.parts if part.in_mlp)
        assert matrices == MATRICES.get(family, SEPARATE)
        assert isinstance(channels.target, ChannelChain) and channels.candidates == channels.target.width
        assert {path for group in block.groups for path in group} == matrices | set(channels.target.paths)


def test_bytes_of_a_channel_are_what_taking_it_out_saves(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    parts = find_parts(start(context), context)[0].parts
    assert any(isinstance(part.target, ChannelChain) for part in parts)
    for part in parts:
        if isinstance(part.target, ChannelChain):
            cut = working_copy(context.block(1), "cpu")
            keep_channels(cut, part.target, torch.arange(part.candidates - 3))
            assert stored_bytes([context.block(1)]) - stored_bytes([cut]) == 3 * part.unit


def test_bytes_of_a_matrix(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.bfloat16())
    sizes = {p.target: (p.candidates, p.unit, p.whole) for p in find_parts(start(context), context)[0].parts}
    assert sizes["self_attn.q_proj"] == (32, 64 * 2, 32 * 32 * 2)
    assert sizes["self_attn.k_proj"] == (16, 48 * 2, 16 * 32 * 2)


def test_places_of_dropped_and_shared_blocks(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    dropped = LayerDrop(2).compress(start(context), context)
    assert {s: b.position for s, b in find_parts(dropped, context).items()} == {0: 1, 1: 4}
    shared = Emulator([EmulatorBlock(context.block(3), 3), EmulatorBlock(context.block(2), 2)], {1: 1, 2: 0, 4: 0})
    assert {s: b.position for s, b in find_parts(shared, context).items()} == {0: 2, 1: 1}


@pytest.mark.parametrize("targets", [("q_proj", "k_proj"), ("up_proj",)])
def test_what_is_low_rank_already_stays_out(
    targets: tuple[str, ...], pico_llama: nn.Module, context_of: MakeContext
) -> None:
    """Without its up projection an MLP has no channels to take out: its other two are matrices like any other."""
    context = context_of(pico_llama)
    built = LowRank(0.8, "plain", targets=targets).compress(start(context), context)
    block = find_parts(built, context)[0]
    targets_left = {part.target for part in block.parts if not part.in_mlp}
    if targets == ("up_proj",):
        assert targets_left == SEPARATE | {"mlp.gate_proj", "mlp.down_proj"}
        assert not any(part.in_mlp for part in block.parts)
    else:
        assert targets_left == {"self_attn.v_proj", "self_attn.o_proj"}
        assert any(part.in_mlp for part in block.parts)


def test_packed_blocks_have_no_parts(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    assert find_parts(Quantize(8).compress(start(context), context), context) == {}


def test_only_some_parts(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    block = find_parts(start(context), context)[1]
    left = block.only([part for part in block.parts if part.target == "self_attn.k_proj"])
    assert [part.target for part in left.parts] == ["self_attn.k_proj"]
    assert left.groups == (("self_attn.k_proj",),) and left.position == 2
