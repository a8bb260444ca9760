"""Output alignment of blocks whose answer can be worked out by hand: dropped, shared, and no sums at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.align import NO_NEARER, NO_SUM, Align, Where
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock
from offsite_fl.models.linears import replace_module

MakeContext = Callable[..., Context]


class Plain(nn.Module):
    """``x -> factor * x + shift``, as a block whose only linear is its writer."""

    def __init__(self, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.idle = nn.Parameter(torch.zeros(1, 1))  # a block has two matrices or more
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(32) * (factor - 1))
            self.linear.bias.fill_(shift)

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states + self.linear(hidden_states)


class Scaled(Plain):
    """The same with half of what its linear gives: no sum of its input and a linear's output."""

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states + 0.5 * self.linear(hidden_states)


def of_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    for index, block in enumerate(blocks):
        replace_module(model, f"model.layers.{index}", block)
    return model.eval()


def factor_of(emulator: Emulator, place: int) -> tuple[Tensor, Tensor]:
    linear = emulator.at(place).linear
    return linear.weight + torch.eye(32), linear.bias


def test_dropped_blocks_are_made_up_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """2x + 1 at place 1, then 3x at 2, 1x at 3 and 5x at 4 are dropped: what is left must be 30x + 15."""
    blocks = [Plain(f, s) for f, s in ((1, 0), (2, 1), (3, 0), (1, 0), (5, 0), (1, 0))]
    context = context_of(of_blocks(pico_llama, blocks))
    built = Align(ridge=1e-12).compress(Emulator([EmulatorBlock(context.block(1), 1)], {1: 0}), context)
    factor, shift = factor_of(built, 1)
    assert_close(factor, torch.eye(32) * 30, rtol=1e-4, atol=1e-3)
    assert_close(shift, torch.full((32,), 15.0), rtol=1e-4, atol=1e-3)


def test_adapter_blocks_in_between(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """An adapter at 0, 2 and 5 makes two stretches, and each ends with the full model's stream: 2x, and 3x * 5."""
    context = context_of(of_blocks(pico_llama, [Plain(f) for f in (1, 2, 7, 3, 5, 1)]), adapter=(0, 2, 5))
    given = Emulator([EmulatorBlock(Plain(1.5), 1), EmulatorBlock(Plain(1.5), 3)], {1: 0, 3: 1})
    built = Align(ridge=1e-12).compress(given, context)
    assert_close(factor_of(built, 1)[0], torch.eye(32) * 2, rtol=1e-4, atol=1e-3)
    assert_close(factor_of(built, 3)[0], torch.eye(32) * 15, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("where", ["last", "first", "ends", "all"])
def test_a_shared_block_gets_its_part_of_the_change(
    where: Where, pico_llama: nn.Module, context_of: MakeContext
) -> None:
    """It runs twice and is wanted to double: at the second place it reads 1.1x, so 2 / 1.1 is fitted there, and it goes
    half of the way, to 1.459. That gives 2.129x instead of 1.21x.
    """
    context = context_of(of_blocks(pico_llama, [Plain(f) for f in (1, 2, 1, 1, 1, 1)]))
    given = Emulator([EmulatorBlock(Plain(1.1), 1)], {1: 0, 2: 0})
    built = Align(where, ridge=1e-12).compress(given, context)
    assert built.notes == () and built.layout == given.layout
    assert_close(factor_of(built, 1)[0], torch.eye(32) * (1.1 + 2 / 1.1) / 2, rtol=1e-4, atol=1e-3)


def test_a_shared_block_that_goes_too_far_stays(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """At 0.5 the fit is 2 / 0.5; half of the way is 2.25, which gives 5.06x: further from 2x than 0.25x is."""
    context = context_of(of_blocks(pico_llama, [Plain(f) for f in (1, 2, 1, 1, 1, 1)]))
    given = Emulator([EmulatorBlock(Plain(0.5), 1)], {1: 0, 2: 0})
    built = Align(ridge=1e-12).compress(given, context)
    assert built.at(1) is given.at(1)
    assert built.notes == (f"align left the block at place 2 as it was: {NO_NEARER}",)


def test_a_shared_block_around_an_adapter_block(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """12 * 2 * 12 is wanted to be 200: it reads 24x at the last place. What lies in between is run again as well: with
    the fit of 200 / 24, half of the way gives 10.17 and 206.7x.
    """
    context = context_of(of_blocks(pico_llama, [Plain(f) for f in (1, 10, 2, 10, 1, 1)]), adapter=(0, 2, 5))
    given = Emulator([EmulatorBlock(Plain(12), 1)], {1: 0, 3: 0})
    built = Align(ridge=1e-12).compress(given, context)
    assert built.notes == ()
    assert_close(factor_of(built, 1)[0], torch.eye(32) * (12 + 200 / 24) / 2, rtol=1e-4, atol=1e-3)


def test_a_block_that_is_no_sum_is_left_with_a_note(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(of_blocks(pico_llama, [Scaled(f) for f in (1, 2, 3, 1, 1, 1)]))
    given = Emulator([EmulatorBlock(context.block(1), 1)], {1: 0})
    built = Align().compress(given, context)
    assert built.at(1) is given.at(1)
    assert built.notes == (f"align left the block at place 1 as it was: {NO_SUM}",)
