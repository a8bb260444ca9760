"""The channels of an MLP in an order in which neighbours are alike, which leaves what the MLP computes as it is."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from offsite_fl.emulators.channels import ChannelChain, keep_channels
from offsite_fl.emulators.penalties import Dim, roughness
from offsite_fl.models.linears import linear_weight


@torch.no_grad()
def reorder_channels(block: nn.Module, chain: ChannelChain, dims: Collection[Dim]) -> None:
    """Put the channels of ``chain`` in ``block`` in a smoother order, in all linears that write and read them.

    Channels are alike by the weights in which they are the outputs (``out``), the inputs (``in``), or both.
    """
    keep_channels(block, chain, smooth_order(_rows(block, chain, dims)))


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
