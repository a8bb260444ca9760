"""What blocks can lose in whole units, MLP channels and groups of attention heads: bytes, weight, and how many stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Context, Emulator
from offsite_fl.emulators.channels import (
    ChannelChain,
    channel_bytes,
    channel_norms,
    column_bytes,
    keep_channels,
    row_bytes,
)
from offsite_fl.emulators.heads import HeadGroups, find_heads, keep_heads
from offsite_fl.emulators.streams import working_copy
from offsite_fl.emulators.watching import Watcher
from offsite_fl.models.linears import linear_weight


@dataclass(frozen=True)
class Units:
    """Equal units side by side in block ``slot`` of an emulator: ``count`` of them, ``size`` bytes each."""

    slot: int
    part: ChannelChain | HeadGroups
    count: int
    size: int

    @property
    def are_heads(self) -> bool:
        """Whether they are groups of attention heads; else they are MLP channels."""
        return isinstance(self.part, HeadGroups)


def find_units(emulator: Emulator, context: Context, heads: bool = True) -> list[Units]:
    """The channels and, with ``heads``, the head groups of all blocks of ``emulator``, block by block.

    Blocks are watched on noise, so no text is needed. What is low-rank or quantised already has no units.
    """
    watcher = Watcher(context)
    first = {slot: position for position, slot in sorted(emulator.layout.items(), reverse=True)}
    found = []
    for slot, position in context.track(sorted(first.items()), "looking at blocks"):
        block = working_copy(emulator.blocks[slot].module, context.device)
        seen = watcher.watch(block, position)
        found += [Units(slot, chain, chain.width, channel_bytes(block, chain)) for chain in seen.chains]
        if heads:
            groups = find_heads(block, watcher.noise, watcher.call(position), seen.plan, seen.chains)
            found += [Units(slot, part, part.count, _group_bytes(block, part)) for part in groups]
    return found


@torch.no_grad()
def saliency(block: nn.Module, units: Units) -> Tensor:
    """L2 norm of each unit's weights, [count] fp32: the rows that write it and the columns that read it."""
    part = units.part
    if isinstance(part, ChannelChain):
        return channel_norms(block, part)
    total = linear_weight(block.get_submodule(part.writer)).float().square().sum(0).view(units.count, -1).sum(1)
    for path in part.readers:
        rows = linear_weight(block.get_submodule(path)).float().square().sum(1)
        total = total + rows.view(units.count, -1).sum(1)
    return total.sqrt()


def keep_units(block: nn.Module, units: Units, kept: Tensor) -> None:
    """Leave only the units ``kept`` (int64, ascending) in ``block``."""
    if isinstance(units.part, ChannelChain):
        keep_channels(block, units.part, kept)
    else:
        keep_heads(block, units.part, kept)


def counts_within(units: Sequence[Units], budget: int, slack: int = 0) -> list[int]:
    """How many of each units stay so that all together they take ``budget`` bytes, at least one of each.

    Every part keeps the same share. Head groups are few, so theirs is rounded and the channels take what this leaves
    over; where they can't, the groups move by as little as brings the bytes within ``slack`` of the budget.
    """
    share = min(1.0, max(0.0, budget / max(1, sum(u.count * u.size for u in units))))
    most = max((u.count for u in units if u.are_heads), default=0)
    options = []
    for moved in range(-most, most + 1):
        groups = {i: _bounded(round(share * u.count) + moved, u) for i, u in enumerate(units) if u.are_heads}
        counts = _fill(units, groups, budget)
        miss = abs(budget - sum(count * u.size for count, u in zip(counts, units, strict=True)))
        options.append((max(0, miss - slack), abs(moved), counts))
    return min(options, key=lambda option: option[:2])[2]


def _fill(units: Sequence[Units], groups: dict[int, int], budget: int) -> list[int]:
    """``groups`` of the heads, and as many channels as fit beside them, the same share of each chain."""
    left = budget - sum(count * units[i].size for i, count in groups.items())
    channels = {i: u for i, u in enumerate(units) if i not in groups}
    share = max(0.0, left / max(1, sum(u.count * u.size for u in channels.values())))
    counts = groups | {i: _bounded(math.floor(share * u.count), u) for i, u in channels.items()}
    left -= sum(counts[i] * u.size for i, u in channels.items())
    for i, u in channels.items():
        if counts[i] < u.count and u.size <= left:
            counts[i], left = counts[i] + 1, left - u.size
    return [counts[i] for i in range(len(units))]


def _bounded(count: int, units: Units) -> int:
    return min(units.count, max(1, count))


def _group_bytes(block: nn.Module, heads: HeadGroups) -> int:
    linears = {path: block.get_submodule(path) for path in (*heads.readers, heads.writer)}
    rows = sum(linear_weight(linears[p]).shape[0] // heads.count * row_bytes(linears[p]) for p in heads.readers)
    writer = linears[heads.writer]
    return rows + linear_weight(writer).shape[1] // heads.count * column_bytes(writer)
