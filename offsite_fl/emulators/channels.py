"""Inner channels of an MLP, found by watching a block run: which linears write them and which one reads them.

In ``down(act(gate(x)) * up(x))``, and in ``fc2(act(fc1(x)))``, the channels between the linears stand side by side: one
can be taken out, or all put in another order, without touching anything else. No module names are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.emulators.groups import BlockPlan
from offsite_fl.models.linears import is_linear, linear_bias, linear_weight, replace_module
from offsite_fl.models.walk import BlockCall, call_block


@dataclass(frozen=True)
class ChannelChain:
    """The inner channels of one MLP.

    ``readers`` are the linears that read the block's stream and write ``width`` channels each (``parts`` times
    ``width`` where one linear writes several halves, as Phi-3's fused gate and up), ``writer`` is the one that reads
    those channels and nothing else.
    """

    readers: tuple[str, ...]
    writer: str
    width: int
    parts: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """All linears of the chain."""
        return (*self.readers, self.writer)


@torch.no_grad()
def find_chains(block: nn.Module, hidden: Tensor, call: BlockCall, plan: BlockPlan) -> tuple[ChannelChain, ...]:
    """The chains of ``block``, in the order in which they run.

    A group of linears and a linear behind it are a chain if what the latter reads follows the former's outputs channel
    by channel and token by token: with both put in another order it comes out in that order. Attention doesn't.

    Args:
        block: a block in eval mode.
        hidden: [B, T, hidden] with at least two tokens.
        call: how the model calls it.
        plan: from :func:`~offsite_fl.emulators.groups.plan_block`.
    """
    chains = []
    for number, group in enumerate(plan.groups):
        for later in plan.groups[number + 1 :]:
            found = None if len(later) > 1 else _chain_between(block, hidden, call, group, later[0])
            if found is not None:
                chains.append(found)
                break
    return tuple(chains)


def _chain_between(
    block: nn.Module, hidden: Tensor, call: BlockCall, group: Sequence[str], writer: str
) -> ChannelChain | None:
    """The chain from members of ``group`` to ``writer``; None if what the writer reads doesn't follow them."""
    width = linear_weight(block.get_submodule(writer)).shape[1]
    outputs = {path: linear_weight(block.get_submodule(path)).shape[0] for path in group}
    for parts in (1, 2):
        readers = tuple(path for path, size in outputs.items() if size == parts * width)
        chain = ChannelChain(readers, writer, width, parts)
        if not readers or not _side_by_side(block, hidden, call, chain):
            continue
        # A member that is as wide by chance (a query beside a parallel MLP) can stay as it is without being missed.
        for path in readers:
            without = replace(chain, readers=tuple(p for p in chain.readers if p != path))
            if without.readers and _side_by_side(block, hidden, call, without):
                chain = without
        return chain
    return None


def keep_channels(block: nn.Module, chain: ChannelChain, kept: Tensor) -> None:
    """Leave only the channels ``kept`` (int64, in the order given) of ``chain`` in ``block``.

    Linears become ``nn.Linear`` of fewer rows or columns; weights are copied, dtypes and biases stay. With all channels
    in another order the block computes what it did before.
    """
    for path in chain.readers:
        linear = block.get_submodule(path)
        rows = torch.cat([kept + part * chain.width for part in range(chain.parts)])
        bias = linear_bias(linear)
        put_linear(block, path, linear_weight(linear)[rows], None if bias is None else bias[rows])
    linear = block.get_submodule(chain.writer)
    put_linear(block, chain.writer, linear_weight(linear)[:, kept], linear_bias(linear))


def channel_bytes(block: nn.Module, chain: ChannelChain) -> int:
    """Bytes that one channel of ``chain`` takes: its rows and biases in the readers, its column in the writer."""
    rows = sum(row_bytes(block.get_submodule(path)) for path in chain.readers)
    return chain.parts * rows + column_bytes(block.get_submodule(chain.writer))


def row_bytes(linear: nn.Module) -> int:
    """Bytes of one output of a linear: its row of the weight and its bias."""
    weight, bias = linear_weight(linear), linear_bias(linear)
    return weight.shape[1] * weight.element_size() + (0 if bias is None else bias.element_size())


def column_bytes(linear: nn.Module) -> int:
    """Bytes of one input of a linear: its column of the weight."""
    weight = linear_weight(linear)
    return weight.shape[0] * weight.element_size()


@torch.no_grad()
def channel_norms(block: nn.Module, chain: ChannelChain) -> Tensor:
    """L2 norm of all weights that a channel takes along, [width] fp32: the saliency of FedPFT (arXiv 2404.11536)."""
    squares = linear_weight(block.get_submodule(chain.writer)).float().square().sum(0)
    for path in chain.readers:
        rows = linear_weight(block.get_submodule(path)).float().square().sum(1)
        squares = squares + rows.view(chain.parts, chain.width).sum(0)
    return squares.sqrt()


def put_linear(block: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put an ``nn.Linear`` of copies of ``weight`` [out, in] and ``bias`` in the place of the linear at ``path``."""
    old = block.get_submodule(path)
    assert is_linear(old)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    replace_module(block, path, new.train(old.training))


def _side_by_side(block: nn.Module, hidden: Tensor, call: BlockCall, chain: ChannelChain) -> bool:
    generator = torch.Generator().manual_seed(0)
    channels = torch.randperm(chain.width, generator=generator).to(hidden.device)
    tokens = torch.randperm(hidden.shape[1], generator=generator).to(hidden.device)
    rows = torch.cat([channels + part * chain.width for part in range(chain.parts)])

    def mixed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        shaped = output.reshape(*hidden.shape[:2], -1)
        return shaped[:, tokens][..., rows].reshape(output.shape)

    plain = _read_by(block, hidden, call, chain, None).reshape(*hidden.shape[:2], -1)
    turned = _read_by(block, hidden, call, chain, mixed).reshape(*hidden.shape[:2], -1)
    expected = plain[:, tokens][..., channels].float()
    error = float((turned.float() - expected).norm())
    return error <= 1e-3 * float(expected.norm()) and float((plain.float() - expected).norm()) > error


def _read_by(
    block: nn.Module, hidden: Tensor, call: BlockCall, chain: ChannelChain, mixed: Callable[..., Tensor] | None
) -> Tensor:
    """What the chain's writer reads, with the readers' outputs passed through ``mixed``."""
    seen: dict[str, Tensor] = {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else next(iter(kwargs.values()))

    handles = [block.get_submodule(chain.writer).register_forward_pre_hook(note, with_kwargs=True)]
    if mixed is not None:
        handles += [block.get_submodule(path).register_forward_hook(mixed) for path in chain.readers]
    try:
        call_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return seen["x"]
