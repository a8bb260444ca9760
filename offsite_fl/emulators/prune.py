"""Pruning: whole channels and heads are taken out, or, as in the paper, small weights become zeros that are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from offsite_fl.config import check_choices
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, register
from offsite_fl.emulators.budget import TOLERANCE, BudgetedMethod, emulator_bytes
from offsite_fl.emulators.units import Units, counts_within, find_units, keep_units, saliency
from offsite_fl.emulators.weights import refuse_quantized, with_matrices
from offsite_fl.errors import EmulatorError

Mode = Literal["structured", "magnitude"]

_WHY_MISSED: dict[Mode, str] = {
    "structured": "each part keeps a whole unit at least, and what is no channel and no removable head stays as it is",
    "magnitude": "zeros are stored",
}


@register("prune")
@dataclass(frozen=True)
class Prune(BudgetedMethod):
    """Take out the channels and heads of smallest weight, or set the smallest weights to zero.

    ``mode``:

    * ``structured``: every block loses the same share of its MLP channels and attention heads, so that the bytes fall
      to ``keep`` of what they were. A unit counts by the L2 norm of the rows that write it and the columns that read
      it; for channels this is FedPFT's saliency (arXiv 2404.11536). A key-value head goes with the query heads that
      read it. Head groups are whole, the channels even out what that leaves; one unit of each part stays. Attention
      that can't lose heads (fused projections, head counts fixed by the config) stays whole, and with ``heads=false``
      every attention does: the channels then make up for it. Needs no text.
    * ``magnitude``: that of the offsite-tuning paper (arXiv 2302.04870). Of every tensor with more than one dimension
      the share ``1 - keep`` is set to zero: with ``k = int(numel * (1 - keep))``, all entries that are no larger than
      the k-th smallest ``|w|``. Zeros are stored, so no bytes are saved; a note says so.
    """

    mode: Mode = "structured"
    heads: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return new blocks that share with ``emulator``'s whatever didn't change."""
        assert budget is not None
        if self.mode == "structured":
            modules = self._without_units(emulator, context, budget)
        else:
            share = min(1.0, budget / emulator_bytes(emulator)) if self.bytes else self.keep
            modules = _with_zeros(emulator, context, share)
        pairs = zip(modules, emulator.blocks, strict=True)
        return Emulator([EmulatorBlock(module, block.origin) for module, block in pairs], dict(emulator.layout))

    def _without_units(self, emulator: Emulator, context: Context, budget: int) -> list[nn.Module]:
        given = emulator_bytes(emulator)
        blocks = [copy_structure(block.module) for block in emulator.blocks]
        if budget >= given:
            return blocks
        units = find_units(emulator, context, self.heads)
        if not units:
            raise EmulatorError(
                "prune: no block has an MLP channel or an attention head that can be taken out; what is low-rank or "
                "quantised already can't be pruned, so put prune first, as in 'prune+quantize'"
            )
        fixed = given - sum(u.count * u.size for u in units)
        counts = counts_within(units, budget - fixed, round(TOLERANCE * budget))
        _keep_largest(blocks, units, counts)
        return blocks

    def _why_missed(self) -> str:
        return _WHY_MISSED[self.mode]


def zero_smallest(weight: Tensor, keep: float) -> Tensor:
    """``weight`` with its ``int(numel * (1 - keep))`` smallest entries, and all that equal the last of them, at 0.

    >>> zero_smallest(torch.tensor([[3.0, -1.0], [2.0, -1.0]]), 0.75)
    tensor([[3., 0.],
            [2., 0.]])
    """
    # Exact: in floats 1 - 0.9 is less than a tenth.
    count = math.floor(weight.numel() * (1 - Fraction(str(keep))))
    if count == 0:
        return weight.clone()
    sizes = weight.float().abs()
    threshold = sizes.flatten().kthvalue(count).values
    return torch.where(sizes <= threshold, torch.zeros_like(weight), weight)


def _with_zeros(emulator: Emulator, context: Context, keep: float) -> list[nn.Module]:
    refuse_quantized(emulator, Prune.name, "packed weights can't be pruned: put quantize last, as in 'prune+quantize'")
    tracked = context.track(emulator.blocks, "prune magnitude", total=len(emulator.blocks))
    return [with_matrices(block.module, lambda weight: zero_smallest(weight, keep)) for block in tracked]


def _keep_largest(blocks: Sequence[nn.Module], units: Sequence[Units], counts: Sequence[int]) -> None:
    """Of all units leave the ``counts`` with the largest weights, in the order in which they stand."""
    for part, count in zip(units, counts, strict=True):
        if count < part.count:
            block = blocks[part.slot]
            keep_units(block, part, saliency(block, part).argsort(descending=True, stable=True)[:count].sort().values)
