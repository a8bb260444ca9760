"""Attention heads that can be taken out of a block, found without names and checked by running the block.

With grouped queries a key-value head and the query heads that read it go together. They can go if the other
heads don't mind: the linear behind the attention must read from them what it read before, which makes the block the one
in which the columns that read the removed heads are zero. Fused projections and code that counts heads in the config
fail this and are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import copy_structure
from offsite_fl.emulators.channels import ChannelChain, put_linear
from offsite_fl.emulators.groups import BlockPlan, run_tapped
from offsite_fl.models.linears import linear_bias, linear_weight
from offsite_fl.models.walk import BlockCall


@dataclass(frozen=True)
class HeadGroups:
    """The heads of one attention in groups that can go one by one.

    ``readers`` write queries, keys and values, ``writer`` reads what the heads return. Each of the ``count`` groups, a
    key-value head and its query heads, has an equal run of consecutive rows of every reader and of columns of the
    writer.
    """

    readers: tuple[str, ...]
    writer: str
    count: int


@torch.no_grad()
def find_heads(
    block: nn.Module, hidden: Tensor, call: BlockCall, plan: BlockPlan, chains: Sequence[ChannelChain]
) -> tuple[HeadGroups, ...]:
    """The attentions of ``block`` that can lose heads, in the order in which they run.

    Args:
        block: a block in eval mode.
        hidden: [B, T, hidden] with at least two tokens.
        call: how the model calls it.
        plan: from :func:`~offsite_fl.emulators.groups.plan_block`.
        chains: from :func:`~offsite_fl.emulators.channels.find_chains`; their linears are no attention's.
    """
    return tuple(heads for heads in _candidates(block, plan, chains) if _can_go(block, hidden, call, heads))


def keep_heads(block: nn.Module, heads: HeadGroups, kept: Tensor) -> None:
    """Leave only the groups ``kept`` (int64, ascending) of ``heads`` in ``block``, as narrower ``nn.Linear``."""
    for path in heads.readers:
        weight, bias = _parts(block, path)
        rows = _runs(kept, weight.shape[0] // heads.count)
        put_linear(block, path, weight[rows], None if bias is None else bias[rows])
    weight, bias = _parts(block, heads.writer)
    put_linear(block, heads.writer, weight[:, _runs(kept, weight.shape[1] // heads.count)], bias)


def _candidates(block: nn.Module, plan: BlockPlan, chains: Sequence[ChannelChain]) -> Iterator[HeadGroups]:
    """Linears that read the same state, and one behind them in the same module, as wide as the widest of them."""
    taken = {path for chain in chains for path in chain.paths}
    for number, group in enumerate(plan.groups):
        readers = tuple(path for path in group if path not in taken)
        for later in plan.groups[number + 1 :]:
            if len(readers) < 2 or len(later) > 1 or later[0] in taken:
                continue
            sizes = {linear_weight(block.get_submodule(path)).shape[0] for path in readers}
            width = linear_weight(block.get_submodule(later[0])).shape[1]
            head = _head_size(block, later[0])
            if max(sizes) == width and head and all(size % head == 0 for size in sizes):
                count = min(sizes) // head
                if count > 1 and all(size % (count * head) == 0 for size in sizes):
                    yield HeadGroups(readers, later[0], count)


def _head_size(block: nn.Module, writer: str) -> int:
    """Features of one head as the module around ``writer``, or its config, tells them; 0 if neither does."""
    attention = block.get_submodule(writer.rpartition(".")[0])
    config = getattr(attention, "config", None)
    told: list[Any] = [getattr(attention, "head_dim", None), getattr(config, "head_dim", None)]
    features, number = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    told.append(features // number if features and number else None)
    return next((size for size in told if isinstance(size, int) and size > 0), 0)


def _can_go(block: nn.Module, hidden: Tensor, call: BlockCall, heads: HeadGroups) -> bool:
    """Whether the writer of a block without the first group reads what it reads now, less that group's columns."""
    cut = copy_structure(block)
    keep_heads(cut, heads, torch.arange(1, heads.count, device=hidden.device))
    before = run_tapped(block, hidden, call, inputs=[heads.writer]).inputs[heads.writer].float()
    try:
        after = run_tapped(cut, hidden, call, inputs=[heads.writer]).inputs[heads.writer].float()
    except Exception:  # the model's own code meets widths it wasn't written for and may fail in any way
        return False
    run = before.shape[-1] // heads.count
    expected, other = before[..., run:], before[..., :-run]
    if after.shape != expected.shape:
        return False
    tolerance = max(1e-3, 4 * torch.finfo(hidden.dtype).eps) * float(expected.norm())
    # Where all groups return the same, equality would prove nothing.
    return float((after - expected).norm()) <= tolerance < float((other - expected).norm())


def _parts(block: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    linear = block.get_submodule(path)
    return linear_weight(linear).detach(), linear_bias(linear)


def _runs(groups: Tensor, length: int) -> Tensor:
    """Indices of runs of ``length``: groups 0 and 2 of length 3 are 0, 1, 2, 6, 7, 8."""
    return (groups.unsqueeze(1) * length + torch.arange(length, device=groups.device)).flatten()
