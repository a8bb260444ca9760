"""What blocks can be made smaller by, the ranks of attention's matrices and the channels of MLPs, in bytes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from offsite_fl.emulators.base import Context, Emulator
from offsite_fl.emulators.channels import ChannelChain, channel_bytes
from offsite_fl.emulators.streams import working_copy
from offsite_fl.emulators.watching import Watcher
from offsite_fl.models.linears import linear_weight


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
    watcher = Watcher(context)
    first = {slot: position for position, slot in sorted(emulator.layout.items(), reverse=True)}
    found = {}
    for slot, position in sorted(first.items()):
        block = working_copy(emulator.blocks[slot].module, context.device)
        seen = watcher.watch(block, position)
        matrices = [_matrix(block, slot, path) for path in seen.attention]
        parts = (*matrices, *(_mlp(block, slot, chain) for chain in seen.chains))
        if parts:
            found[slot] = BlockParts(position, parts, seen.plan.groups)
    return found


def _matrix(block: nn.Module, slot: int, path: str) -> Part:
    weight = linear_weight(block.get_submodule(path))
    rows, columns = weight.shape
    size = weight.element_size()
    return Part(slot, path, min(rows, columns), (rows + columns) * size, rows * columns * size)


def _mlp(block: nn.Module, slot: int, chain: ChannelChain) -> Part:
    unit = channel_bytes(block, chain)
    return Part(slot, chain, chain.width, unit, chain.width * unit)
