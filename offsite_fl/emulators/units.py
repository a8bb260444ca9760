"""What blocks can lose in whole units, MLP channels and groups of attention heads: bytes, weight, and how many stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.channels import ChannelChain, find_chains, keep_channels
from offsite_fl.emulators.groups import plan_block
from offsite_fl.emulators.heads import HeadGroups, find_heads, keep_heads
from offsite_fl.emulators.streams import TextBatch, read_batches, working_copy
from offsite_fl.models.linears import linear_bias, linear_weight

# Rows and tokens of the noise that blocks are watched on.
PROBE = (2, 16)


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
    probe = _probe(context)
    first = {slot: position for position, slot in sorted(emulator.layout.items(), reverse=True)}
    found = []
    for slot, position in context.track(sorted(first.items()), "looking at blocks"):
        module = emulator.blocks[slot].module
        block, call = working_copy(module, context.device), probe.calls[position]
        noise = _noise(probe.entry)
        plan = plan_block(block, noise, call, probe.rows)
        chains = find_chains(block, noise, call, plan)
        found += [Units(slot, chain, chain.width, _channel_bytes(module, chain)) for chain in chains]
        if heads:
            groups = find_heads(block, noise, call, plan, chains)
            found += [Units(slot, part, part.count, _group_bytes(module, part)) for part in groups]
    return found


@torch.no_grad()
def saliency(block: nn.Module, units: Units) -> Tensor:
    """L2 norm of each unit's weights, [count] fp32: the rows that write it and the columns that read it.

    For a channel this is FedPFT's measure (arXiv 2404.11536).
    """
    part = units.part
    total = linear_weight(block.get_submodule(part.writer)).float().square().sum(0).view(units.count, -1).sum(1)
    for path in part.readers:
        rows = linear_weight(block.get_submodule(path)).float().square().sum(1)
        if isinstance(part, ChannelChain):
            total = total + rows.view(part.parts, units.count).sum(0)
        else:
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


def _probe(context: Context) -> TextBatch:
    ids = torch.zeros(PROBE, dtype=torch.int64)
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return read_batches(context, [batch])[0]


def _noise(like: Tensor) -> Tensor:
    """A hidden state in which every token is another, which that of equal tokens isn't."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _channel_bytes(block: nn.Module, chain: ChannelChain) -> int:
    return chain.parts * sum(_row_bytes(block, path) for path in chain.readers) + _column_bytes(block, chain.writer)


def _group_bytes(block: nn.Module, heads: HeadGroups) -> int:
    weights = {path: linear_weight(block.get_submodule(path)) for path in (*heads.readers, heads.writer)}
    rows = sum(weights[path].shape[0] // heads.count * _row_bytes(block, path) for path in heads.readers)
    return rows + weights[heads.writer].shape[1] // heads.count * _column_bytes(block, heads.writer)


def _row_bytes(block: nn.Module, path: str) -> int:
    """Bytes of one output of a linear: its row of the weight and its bias."""
    linear = block.get_submodule(path)
    weight, bias = linear_weight(linear), linear_bias(linear)
    return weight.shape[1] * weight.element_size() + (0 if bias is None else bias.element_size())


def _column_bytes(block: nn.Module, path: str) -> int:
    """Bytes of one input of a linear: its column of the weight."""
    weight = linear_weight(block.get_submodule(path))
    return weight.shape[0] * weight.element_size()
