"""How much of the owner's model leaves the house unchanged, down to single rows, columns and entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offsite_fl.emulators.base import Context, Emulator
from offsite_fl.emulators.budget import count_parameters
from offsite_fl.models.linears import LowRankLinear
from offsite_fl.models.network import shared_tensors

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verbatim_share(emulator: Emulator, context: Context) -> float:
    """Share of the full model's parameters that leaves the owner's house unchanged.

    Adapter blocks and everything outside the blocks always do. An emulator tensor is set against the tensor of the same
    name in the block that it was made from, and what :func:`leaves_verbatim` finds in it counts. No parameter of the
    owner's counts twice, in however many places or tensors it leaves.
    """
    always = [p for index in context.adapter for p in context.block(index).parameters()]
    named = dict(context.model.named_parameters())
    outside = (name.removeprefix("shared.") for name in shared_tensors(context.model, context.blocks))
    always += [named[name] for name in outside if name in named]
    whole = {id(parameter): parameter.numel() for parameter in always}
    owned: dict[int, Tensor] = {}
    sent: defaultdict[int, list[Tensor]] = defaultdict(list)
    for block in emulator.blocks:
        for own, tensor in _pairs(context.block(block.origin), block.module):
            if id(own) not in whole:
                owned[id(own)] = own
                sent[id(own)].append(tensor)
    middle = sum(_count(own, sent[key]) for key, own in owned.items())
    return (sum(whole.values()) + middle) / count_parameters([context.model])


@torch.no_grad()
def leaves_verbatim(own: Tensor, sent: Tensor) -> Tensor:
    """Which entries of ``own`` leave with ``sent``, bit for bit; a mask of the shape of ``own``.

    Of a tensor of the same shape the entries that are equal in place. Of one that differs in the length of a single
    dimension the slices along it, rows or columns, that stand among those of ``own``, wherever; each of the owner's
    leaves once. Of any other shape, or in another dtype, nothing.

    >>> own = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> leaves_verbatim(own, torch.tensor([[5.0, 6.0], [1.0, 0.0]])).int()
    tensor([[0, 0],
            [0, 0],
            [1, 1]], dtype=torch.int32)
    """
    found = torch.zeros(own.shape, dtype=torch.bool)
    if own.dtype != sent.dtype or own.dim() != sent.dim():
        return found
    other = [dim for dim, (a, b) in enumerate(zip(own.shape, sent.shape, strict=True)) if a != b]
    if not other:
        return (_bits(own) == _bits(sent)).cpu()
    if len(other) == 1:
        where: dict[bytes, list[int]] = defaultdict(list)
        for number, bits in enumerate(_slices(own, other[0])):
            where[bits].append(number)
        left = (where[bits] for bits in _slices(sent, other[0]) if bits in where)
        found.transpose(0, other[0])[[numbers.pop() for numbers in left if numbers]] = True
    return found


def _pairs(origin: nn.Module, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of ``module`` that has its like in ``origin``: the owner's first, both in one orientation."""
    named = dict(origin.named_parameters())
    theirs, ours = dict(origin.named_modules()), dict(module.named_modules())
    for name, tensor in module.named_parameters():
        path, _, last = name.rpartition(".")
        if name not in named and last == "bias" and isinstance(ours.get(path.rpartition(".")[0]), LowRankLinear):
            # Two factors carry the bias of the linear that they stand for, in the second of them.
            path = path.rpartition(".")[0]
            name = f"{path}.bias"
        if name in named:
            # GPT-2's linears are stored the other way round, until a method replaces one.
            turned = isinstance(theirs.get(path), Conv1D) and not isinstance(ours.get(path), Conv1D)
            yield named[name], tensor.T if turned and last == "weight" else tensor


def _count(own: Tensor, sent: Sequence[Tensor]) -> int:
    if any(tensor is own for tensor in sent):
        return own.numel()
    found = leaves_verbatim(own, sent[0])
    for tensor in sent[1:]:
        found |= leaves_verbatim(own, tensor)
    return int(found.sum())


def _bits(tensor: Tensor) -> Tensor:
    """The entries as integers of their width, so that equal means equal in every bit."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _slices(tensor: Tensor, dim: int) -> Iterable[bytes]:
    """Every slice of ``tensor`` along ``dim`` as bytes, in order."""
    rows = _bits(tensor.transpose(0, dim)).cpu().numpy()
    return (row.tobytes() for row in rows)
