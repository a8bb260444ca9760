"""The cut of some linears of a block, such as its attention, to a share of their rank."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import nn

from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.rank_rules import cut_to
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
