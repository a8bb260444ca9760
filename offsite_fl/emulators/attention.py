"""Which linears of a block are its attention, found by watching, and the cut of them alone to a lower rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.channels import find_chains
from offsite_fl.emulators.groups import dense_linears, plan_block
from offsite_fl.emulators.rank_rules import cut_to
from offsite_fl.emulators.streams import TextBatch, read_batches, working_copy
from offsite_fl.models.linears import linear_weight


def rank_at(rank_keep: float, rows: int, columns: int) -> int | None:
    """``max(1, floor(rank_keep * min(rows, columns)))``; None where the matrix stays dense.

    That is at ``rank_keep = 1`` and wherever two factors of this rank wouldn't hold fewer numbers than the matrix, for
    a square one from half of its rank on.

    >>> rank_at(0.2, 2048, 2048), rank_at(0.2, 512, 2048), rank_at(0.5, 64, 64), rank_at(0.001, 64, 64)
    (409, 102, None, 1)
    """
    rank = max(1, math.floor(Fraction(str(rank_keep)) * min(rows, columns)))
    return None if rank_keep >= 1 or rank * (rows + columns) >= rows * columns else rank


@dataclass
class AttentionFinder:
    """Finds the attention of the full model's blocks: linears that run once and are no part of an MLP's channels.

    Blocks of one class with linears of the same shapes are alike, so one of them is looked at.
    """

    context: Context
    batch: TextBatch = field(init=False)
    _known: dict[tuple[object, ...], tuple[str, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        first = [{name: rows[:2] for name, rows in batch.items()} for batch in self.context.calibration[:1]]
        (self.batch,) = read_batches(self.context, first or [_some_tokens()])

    def paths(self, origin: int) -> tuple[str, ...]:
        """Paths of the attention's linears in the full model's block ``origin``."""
        block = self.context.block(origin)
        key = (type(block), *((path, linear_weight(linear).shape) for path, linear in dense_linears(block)))
        if key not in self._known:
            own, call, entry = working_copy(block, self.context.device), self.batch.calls[origin], self.batch.entry
            plan = plan_block(own, entry, call, self.batch.rows)
            inside = {path for chain in find_chains(own, entry, call, plan) for path in chain.paths}
            self._known[key] = tuple(path for group in plan.groups for path in group if path not in inside)
        return self._known[key]

    @torch.no_grad()
    def returns(self, origin: int) -> int:
        """Number of items of the tuple that the full model's block ``origin`` returns; 0 for a bare state."""
        own, call = working_copy(self.context.block(origin), self.context.device), self.batch.calls[origin]
        output = own(self.batch.entry, *call.args, **call.kwargs)
        return len(output) if isinstance(output, tuple) else 0


def saved_bytes(block: nn.Module, paths: tuple[str, ...], rank_keep: float) -> int:
    """Bytes that :func:`cut_to_rank` takes off ``block``."""
    saved = 0
    for weight in (linear_weight(linear) for path, linear in dense_linears(block) if path in paths):
        rows, columns = weight.shape
        rank = rank_at(rank_keep, rows, columns)
        saved += 0 if rank is None else (rows * columns - rank * (rows + columns)) * weight.element_size()
    return saved


def cut_to_rank(block: nn.Module, paths: tuple[str, ...], rank_keep: float) -> None:
    """Replace the dense linears of ``block`` at ``paths`` by the factors of their truncated SVD.

    Linears that the factors wouldn't make smaller, and those that were replaced before, stay. Bias and dtype stay.
    """
    for path, linear in list(dense_linears(block)):
        weight = linear_weight(linear).detach()
        rank = rank_at(rank_keep, *weight.shape)
        if path in paths and rank is not None:
            cut_to(block, path, weight.double(), rank)


def _some_tokens() -> Batch:
    # Different ones: attention over equal tokens can't be told from channels that stand side by side.
    ids = torch.arange(1, 17)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
