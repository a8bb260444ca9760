"""What blocks can lose: bytes of a unit against bytes really gone, saliency against slow sums, counts by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, Emulator, copy_structure, start
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.heads import HeadGroups
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.emulators.units import Units, counts_within, find_units, keep_units, saliency
from offsite_fl.models.linears import linear_weight

MakeContext = Callable[..., Context]
CHAIN, HEADS = ChannelChain(("up",), "down", 10), HeadGroups(("q", "k", "v"), "o", 2)
WITHOUT_HEADS = ("gpt2", "bloom", "gpt_neox", "opt")


def test_families(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Found on noise: no text is given."""
    context = context_of(pico(family), calibration=())
    units = find_units(start(context), context)
    kinds = [(u.slot, u.are_heads) for u in units]
    per_block = [False] if family in WITHOUT_HEADS else [False, True]
    assert kinds == [(slot, heads) for slot in range(4) for heads in per_block]
    assert find_units(start(context), context, heads=False) == [u for u in units if not u.are_heads]


def test_the_size_of_a_unit_is_what_goes_with_it(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    for units in find_units(start(context), context):
        block = copy_structure(context.block(1 + units.slot))
        before = stored_bytes([block])
        keep_units(block, units, torch.arange(units.count - 1))
        assert before - stored_bytes([block]) == units.size


def test_half_of_a_fused_linear(pico_phi3: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_phi3)
    (units, *_) = find_units(start(context), context)
    block = copy_structure(context.block(1))
    before = stored_bytes([block])
    keep_units(block, units, torch.arange(10))
    assert before - stored_bytes([block]) == 38 * units.size == 38 * 3 * 32 * 4


def test_saliency_of_gated_channels(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    weights = dict(context.block(1).get_submodule("mlp").named_parameters())
    gate, up, down = (weights[f"{name}_proj.weight"].tolist() for name in ("gate", "up", "down"))
    units = next(u for u in find_units(start(context), context) if not u.are_heads)
    expected = [math.sqrt(sum(v * v for v in [*gate[c], *up[c], *(row[c] for row in down)])) for c in range(64)]
    assert_close(saliency(context.block(1), units), torch.tensor(expected))


def test_saliency_is_fedpfts_on_two_linears(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """The norm of a neuron's in-weights and out-weights put together; GPT-2 stores both the other way round."""
    context = context_of(pico("gpt2"))
    units = find_units(start(context), context)[0]
    mlp = context.block(1).mlp
    both = torch.cat([mlp.c_fc.weight, mlp.c_proj.weight.T])  # type: ignore[union-attr, operator]
    assert_close(saliency(context.block(1), units), both.detach().norm(dim=0))


def test_saliency_of_fused_halves(pico_phi3: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_phi3)
    units = find_units(start(context), context)[0]
    mlp = context.block(1).mlp
    gate, up = mlp.gate_up_proj.weight.detach().chunk(2)  # type: ignore[union-attr, operator]
    both = torch.cat([gate, up, mlp.down_proj.weight.detach().T], dim=1)  # type: ignore[union-attr, operator]
    assert_close(saliency(context.block(1), units), both.norm(dim=1))


def test_saliency_of_heads(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Two groups: query heads 0 and 1 with key-value head 0, the others with head 1; a head has 8 features."""
    context = context_of(pico_llama)
    units = next(u for u in find_units(start(context), context) if u.are_heads)
    attention = context.block(1).get_submodule("self_attn")
    q, k, v, o = (linear_weight(attention.get_submodule(f"{n}_proj")).detach() for n in "qkvo")
    expected = [
        torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8], o[:, 16 * g : 16 * g + 16].T])
        for g in (0, 1)
    ]
    assert_close(saliency(context.block(1), units), torch.stack([part.norm() for part in expected]))


def channels(count: int, size: int) -> Units:
    return Units(0, CHAIN, count, size)


def heads(count: int, size: int) -> Units:
    return Units(0, HEADS, count, size)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (200, [10, 2]),
        (1000, [10, 2]),
        (100, [5, 1]),  # half of each
        (150, [5, 2]),  # 1.5 groups are 2; the channels make up for it
        (110, [6, 1]),
        (119, [6, 1]),
        (60, [1, 1]),
        (0, [1, 1]),  # one of each stays
        (-50, [1, 1]),
    ],
)
def test_counts_by_hand(budget: int, expected: list[int]) -> None:
    """Ten channels of 10 bytes, two head groups of 50."""
    assert counts_within([channels(10, 10), heads(2, 50)], budget) == expected


def test_a_channel_more_for_those_in_front() -> None:
    chains = [channels(3, 10), channels(3, 10), channels(3, 10)]
    assert counts_within(chains, 60) == [2, 2, 2]
    assert counts_within(chains, 70) == [3, 2, 2]
    assert counts_within(chains, 79) == [3, 2, 2]
    assert counts_within(chains, 80) == [3, 3, 2]


def test_heads_move_where_channels_can_not_make_up() -> None:
    """Two channels of 10 bytes and four groups of 50, 85 bytes asked for: the share is 85/220.

    1.5 groups are 2, with a channel 110 bytes, 25 too many; one group and both channels are 70, 15 too few.
    """
    parts = [channels(2, 10), heads(4, 50)]
    assert counts_within(parts, 85) == [2, 1]
    assert counts_within(parts, 85, slack=15) == [2, 1]
    assert counts_within(parts, 85, slack=25) == [1, 2]  # near enough: nothing moves


def test_heads_alone_and_channels_alone() -> None:
    assert counts_within([heads(4, 50)], 100) == [2]
    assert counts_within([heads(4, 50)], 10) == [1]
    assert counts_within([channels(7, 10)], 35) == [3]


def test_the_same_share_everywhere(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    units = find_units(start(context), context)
    whole = sum(u.count * u.size for u in units)
    counts = counts_within(units, whole // 2)
    assert {count for count, u in zip(counts, units, strict=True) if u.are_heads} == {1}
    assert {count for count, u in zip(counts, units, strict=True) if not u.are_heads} == {32}


def test_what_is_replaced_already_has_no_units(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    for spec in ("low-rank:mode=plain", "quantize"):
        built = parse_emulator(spec).compress(start(context), context)
        assert find_units(built, context) == []
    attention_only = "low-rank:keep=0.9,mode=plain,targets=q_proj/k_proj/v_proj/o_proj"
    built = parse_emulator(attention_only).compress(start(context), context)
    assert [u.are_heads for u in find_units(built, context)] == [False] * 4


def test_a_shared_block_is_looked_at_once(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    whole = start(context)
    shared = Emulator([whole.blocks[0], whole.blocks[3]], {1: 0, 2: 0, 4: 1})
    assert [u.slot for u in find_units(shared, context, heads=False)] == [0, 1]
