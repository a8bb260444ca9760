"""The dims of attention's values, which can change places inside their head: found by watching a block run.

A head returns a weighted mean of value vectors, so dims of the values come out in the order in which they were written,
whatever the weights are. No module names are used.

Queries and keys have no such freedom where positions are rotary: each pair of their dims is turned by an angle of its
own, and in the place of another pair it would be turned by that one's. So they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import copy_structure
from offsite_fl.emulators.channels import put_linear
from offsite_fl.emulators.groups import run_tapped
from offsite_fl.emulators.heads import HeadGroups
from offsite_fl.models.linears import linear_bias, linear_weight
from offsite_fl.models.walk import BlockCall


@dataclass(frozen=True)
class ValueDims:
    """The values of one attention.

    The linear ``value`` writes ``heads`` heads of ``size`` dims, one after the other, and ``writer`` reads each of them
    ``copies`` times side by side, once from every query head that looks at it.
    """

    value: str
    writer: str
    heads: int
    size: int
    copies: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """Both linears."""
        return (self.value, self.writer)

    def rows(self, order: Tensor) -> Tensor:
        """Indices of the value's outputs with the dims of each head in ``order`` [heads, size]."""
        starts = torch.arange(self.heads, device=order.device) * self.size
        return (starts[:, None] + order).flatten()

    def columns(self, order: Tensor) -> Tensor:
        """Indices of the writer's inputs with the dims of each head in ``order`` [heads, size].

        >>> ValueDims("v", "o", heads=2, size=2, copies=2).columns(torch.tensor([[1, 0], [0, 1]])).tolist()
        [1, 0, 3, 2, 4, 5, 6, 7]
        """
        starts = torch.arange(self.heads * self.copies, device=order.device) * self.size
        return (starts[:, None] + order.repeat_interleave(self.copies, dim=0)).flatten()


@torch.no_grad()
def find_values(
    block: nn.Module, hidden: Tensor, call: BlockCall, heads: Sequence[HeadGroups]
) -> tuple[ValueDims, ...]:
    """The values of the attentions ``heads``, from :func:`~offsite_fl.emulators.heads.find_heads` on the same block.

    Of the linears that an attention reads with, the values' is the one whose dims the linear behind finds in the order
    in which they were written. An attention where this is none is left out.
    """
    found = []
    for groups in heads:
        candidates = (_values_at(block, path, groups) for path in groups.readers)
        found += [values for values in candidates if _follows(block, hidden, call, values)][:1]
    return tuple(found)


def _values_at(block: nn.Module, path: str, groups: HeadGroups) -> ValueDims:
    rows = linear_weight(block.get_submodule(path)).shape[0]
    width = linear_weight(block.get_submodule(groups.writer)).shape[1]
    return ValueDims(path, groups.writer, groups.count, rows // groups.count, width // rows)


def _follows(block: nn.Module, hidden: Tensor, call: BlockCall, values: ValueDims) -> bool:
    """Whether the writer reads the dims of each head moved on by one if they are written so."""
    order = torch.arange(values.size, device=hidden.device).roll(1).expand(values.heads, -1)
    moved = copy_structure(block)
    linear, rows = moved.get_submodule(values.value), values.rows(order)
    bias = linear_bias(linear)
    put_linear(moved, values.value, linear_weight(linear)[rows], None if bias is None else bias[rows])
    plain, turned = (
        run_tapped(b, hidden, call, inputs=[values.writer], partial=True).inputs[values.writer].float()
        for b in (block, moved)
    )
    expected = plain[..., values.columns(order)]
    tolerance = max(1e-3, 4 * torch.finfo(hidden.dtype).eps) * float(expected.norm())
    # Where all dims are the same, equality would prove nothing.
    return float((turned - expected).norm()) <= tolerance < float((plain - expected).norm())
