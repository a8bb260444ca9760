"""What is free to change places in an order in which neighbours are alike, which leaves what a block computes as it is.

That is an MLP's channels (rows of what writes them, columns of what reads them), and the dims of attention's values
inside each head: rows of the values' linear, columns of the linear behind for all query heads that look at that head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.channels import ChannelChain, put_linear
from offsite_fl.emulators.free_order import Free
from offsite_fl.emulators.penalties import Dim, roughness
from offsite_fl.emulators.value_dims import ValueDims
from offsite_fl.models.linears import linear_bias, linear_weight


@dataclass(frozen=True)
class Order:
    """Linears of a block by path, with the indices (int64) of their ``rows`` or ``columns`` in the new order."""

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]


def reorder(block: nn.Module, free: Free, dims: Collection[Dim]) -> None:
    """Put what is ``free`` in ``block`` in a smoother order; see :func:`find_order`."""
    put_in_order(block, find_order(block, free, dims))


@torch.no_grad()
def find_order(block: nn.Module, free: Free, dims: Collection[Dim]) -> Order:
    """A smoother order of what is ``free`` in ``block``, for all linears that write and read it.

    Channels are alike by the weights in which they are the outputs (``out``), the inputs (``in``), or both; dims of
    values too, each head for itself.
    """
    if isinstance(free, ChannelChain):
        order = smooth_order(_rows(block, free, dims))
        rows = torch.cat([order + part * free.width for part in range(free.parts)])
        return Order(dict.fromkeys(free.readers, rows), {free.writer: order})
    order = torch.stack([smooth_order(rows) for rows in _heads(block, free, dims)])
    return Order({free.value: free.rows(order)}, {free.writer: free.columns(order)})


@torch.no_grad()
def put_in_order(block: nn.Module, order: Order) -> None:
    """Put the rows and columns of linears of ``block`` in the order given, as new ``nn.Linear``."""
    for path, rows in order.rows.items():
        linear = block.get_submodule(path)
        bias = linear_bias(linear)
        put_linear(block, path, linear_weight(linear)[rows], None if bias is None else bias[rows])
    for path, columns in order.columns.items():
        linear = block.get_submodule(path)
        put_linear(block, path, linear_weight(linear)[:, columns], linear_bias(linear))


def smooth_order(rows: Tensor) -> Tensor:
    """An order of ``rows`` [count, features] in which ``sum_i ||w_(i+1) - w_i||^2`` is small; int64 indices [count].

    Greedy: from the row farthest from the mean always to the nearest that is left. The order that they stand in, where
    that is no worse. The distances of all pairs are in memory, count^2 fp32.

    >>> smooth_order(torch.tensor([[0.0], [9.0], [1.0], [8.0]]))
    tensor([0, 2, 3, 1])
    """
    rows = rows.float()
    order = _greedy(rows)
    given = torch.arange(len(rows), device=rows.device)
    return order if roughness(rows[order], 1) < roughness(rows, 1) else given


def _greedy(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    sizes = centred.square().sum(1)
    distances = sizes[:, None] + sizes - 2 * centred @ centred.T
    here = int(sizes.argmax())
    order = [here]
    for _ in range(len(rows) - 1):
        distances[:, here] = torch.inf  # no way back
        here = int(distances[here].argmin())
        order.append(here)
    return torch.tensor(order, device=rows.device)


def _rows(block: nn.Module, chain: ChannelChain, dims: Collection[Dim]) -> Tensor:
    """One row a channel: its weights in the readers of the stream (``out``) and in the linear behind it (``in``)."""
    found: list[Tensor] = []
    if "out" in dims:
        for path in chain.readers:
            found += linear_weight(block.get_submodule(path)).chunk(chain.parts)
    if "in" in dims:
        found.append(linear_weight(block.get_submodule(chain.writer)).T)
    return torch.cat(found, dim=1)


def _heads(block: nn.Module, values: ValueDims, dims: Collection[Dim]) -> Tensor:
    """[heads, size, features]: a row a dim, of its weights in the values' linear and in the one behind."""
    found: list[Tensor] = []
    if "out" in dims:
        weight = linear_weight(block.get_submodule(values.value))
        found.append(weight.reshape(values.heads, values.size, -1))
    if "in" in dims:
        columns = linear_weight(block.get_submodule(values.writer)).T
        copies = columns.reshape(values.heads, values.copies, values.size, -1).transpose(1, 2)
        found.append(copies.reshape(values.heads, values.size, -1))
    return torch.cat(found, dim=2)
