"""What blocks can be made smaller by, the ranks of attention's matrices and the channels of MLPs, in bytes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.channels import ChannelChain, find_chains
from offsite_fl.emulators.groups import BlockPlan, dense_linears, plan_block
from offsite_fl.emulators.streams import TextBatch, read_batches, working_copy
from offsite_fl.models.linears import linear_bias, linear_weight

# Rows and tokens of the noise that blocks are watched on.
PROBE = (2, 16)


@dataclass(frozen=True)
class Part:
    """One matrix (``target`` is its path) or one MLP's channels in block ``slot`` of an emulator.

    Of its ``candidates`` (singular directions or channels) each that stays takes ``unit`` bytes; left as it is the part
    takes ``whole`` bytes, for a square matrix as many as half of its directions.
    """

    slot: int
    target: str | ChannelChain
    candidates: int
    unit: int
    whole: int

    @property
    def in_mlp(self) -> bool:
        """Whether it is an MLP's channels."""
        return isinstance(self.target, ChannelChain)

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears that it is made of."""
        return self.target.paths if isinstance(self.target, ChannelChain) else (self.target,)

    def held(self, count: int) -> int:
        """Bytes with ``count`` candidates; a matrix that its factors wouldn't make smaller is left as it is."""
        return min(count * self.unit, self.whole)

    def exact(self, share: float) -> Fraction:
        """How many candidates take the ``share`` of the part's bytes, a fraction of one included."""
        return Fraction(str(share)) * self.whole / self.unit


@dataclass(frozen=True)
class BlockParts:
    """What can be cut in one block: it runs first at ``position``; ``groups`` are the linears by what they read."""

    position: int
    parts: tuple[Part, ...]
    groups: tuple[tuple[str, ...], ...]

    @property
    def runs(self) -> dict[str, int]:
        """By path, in how many equal runs of outputs a linear of a channel chain counts as several."""
        chains = [part.target for part in self.parts if isinstance(part.target, ChannelChain)]
        return {path: chain.parts for chain in chains for path in chain.readers}

    def only(self, parts: Collection[Part]) -> BlockParts:
        """The same block with nothing but ``parts`` and the linears that they are made of."""
        left = tuple(part for part in self.parts if part in parts)
        paths = {path for part in left for path in part.paths}
        groups = (tuple(path for path in group if path in paths) for group in self.groups)
        return BlockParts(self.position, left, tuple(group for group in groups if group))


def find_parts(emulator: Emulator, context: Context) -> dict[int, BlockParts]:
    """The parts of all blocks of ``emulator`` by slot; a block without any isn't listed.

    Blocks are watched on noise. What was replaced before isn't dense any more and stays out, and so does a linear that
    runs never or several times.
    """
    ids = torch.zeros(PROBE, dtype=torch.int64)
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (probe,) = read_batches(context, [batch])
    first = {slot: position for position, slot in sorted(emulator.layout.items(), reverse=True)}
    found = {}
    for slot, position in sorted(first.items()):
        block = working_copy(emulator.blocks[slot].module, context.device)
        plan, chains = _watched(block, probe, position)
        inside = {path for chain in chains for path in chain.paths}
        matrices = [path for group in plan.groups for path in group if path not in inside]
        parts = (*(_matrix(block, slot, path) for path in matrices), *(_mlp(block, slot, chain) for chain in chains))
        if parts:
            found[slot] = BlockParts(position, parts, plan.groups)
    return found


def _watched(block: nn.Module, probe: TextBatch, position: int) -> tuple[BlockPlan, tuple[ChannelChain, ...]]:
    if not any(dense_linears(block)):
        return BlockPlan((), (), ()), ()
    call, noise = probe.calls[position], _noise(probe.entry)
    plan = plan_block(block, noise, call, probe.rows)
    return plan, find_chains(block, noise, call, plan)


def _noise(like: Tensor) -> Tensor:
    """A hidden state in which every token is another: attention over equal tokens would look like channels."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _matrix(block: nn.Module, slot: int, path: str) -> Part:
    weight = linear_weight(block.get_submodule(path))
    rows, columns = weight.shape
    size = weight.element_size()
    return Part(slot, path, min(rows, columns), (rows + columns) * size, rows * columns * size)


def _mlp(block: nn.Module, slot: int, chain: ChannelChain) -> Part:
    column = linear_weight(block.get_submodule(chain.writer))
    unit = column.shape[0] * column.element_size()
    for path in chain.readers:
        linear = block.get_submodule(path)
        weight, bias = linear_weight(linear), linear_bias(linear)
        row = weight.shape[1] * weight.element_size() + (0 if bias is None else bias.element_size())
        unit += chain.parts * row
    return Part(slot, chain, chain.width, unit, chain.width * unit)
