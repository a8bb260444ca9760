"""The seam: layouts, references instead of copies, copies that leave the original alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, start
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import replace_module

MakeContext = Callable[..., Context]


def test_start_refers_to_the_middle(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, adapter=(0, 3, 5))
    emulator = start(context)
    assert emulator.positions == (1, 2, 4)
    assert all(emulator.at(index) is context.block(index) for index in emulator.positions)
    assert [block.origin for block in emulator.blocks] == [1, 2, 4]


@pytest.mark.parametrize("layout", [{1: 0}, {1: 0, 2: 2}, {}])
def test_every_block_runs_and_every_place_has_one(layout: dict[int, int]) -> None:
    blocks = [EmulatorBlock(nn.Identity(), 1), EmulatorBlock(nn.Identity(), 2)]
    with pytest.raises(EmulatorError, match="every block must run somewhere"):
        Emulator(blocks, layout)


def test_a_structural_copy_shares_weights_and_nothing_else(pico_llama: nn.Module, context_of: MakeContext) -> None:
    block = context_of(pico_llama).block(2)
    copied = copy_structure(block)
    ours, theirs = dict(copied.named_parameters()), dict(block.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    replace_module(copied, "mlp.down_proj", nn.Identity())
    assert isinstance(block.get_submodule("mlp.down_proj"), nn.Linear)
    copied.train()
    assert not block.training


def test_missing_calibration_says_what_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    with pytest.raises(EmulatorError, match="this test needs calibration text"):
        context_of(pico_llama, calibration=()).need_calibration("this test")


def test_progress_bars_only_when_asked_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    items = [torch.zeros(())]
    assert context_of(pico_llama).track(items, "quiet") is items
    assert list(context_of(pico_llama, progress=True).track(items, "shown")) == items
