"""Fixtures for emulators: public text as batches, one of them padded, and the context of a pico model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.models.blocks import find_blocks


def random_batches(count: int = 3, rows: int = 4, length: int = 16, seed: int = 0) -> tuple[Batch, ...]:
    """Random tokens; the second row of each batch is padded from position 11 on."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, 64, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return tuple(batches)


@pytest.fixture
def batches() -> tuple[Batch, ...]:
    return random_batches()


@pytest.fixture
def context_of(batches: tuple[Batch, ...]) -> Callable[..., Context]:
    """``context_of(model, adapter=(0, 5), **changes)``: a context with calibration text."""

    def make(model: nn.Module, adapter: tuple[int, ...] = (0, 5), **changes: Any) -> Context:
        blocks = find_blocks(model)
        middle = tuple(index for index in range(blocks.depth) if index not in adapter)
        return Context(model, blocks, adapter, middle, **({"calibration": batches} | changes))

    return make
