"""Weights of blocks: copies with other values in the matrices, and the refusal of packed ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Emulator, copy_structure
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import QuantizedLinear


@torch.no_grad()
def with_matrices(block: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of ``block`` in which every parameter of more than one dimension is ``change`` of it.

    Shape, dtype and ties stay; vectors and buffers are those of ``block``.
    """
    copied = copy_structure(block)
    changed: dict[int, nn.Parameter] = {}
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim < 2:
                continue
            if id(parameter) not in changed:
                value = change(parameter.detach()).to(parameter.dtype)
                changed[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, changed[id(parameter)])
    return copied


def refuse_quantized(emulator: Emulator, name: str, advice: str) -> None:
    """``EmulatorError`` if the emulator holds packed weights, which the method ``name`` can't work on."""
    for number, block in enumerate(emulator.blocks):
        for path, module in block.module.named_modules():
            if isinstance(module, QuantizedLinear):
                raise EmulatorError(
                    f"{name}: {path} of emulator block {number} has {module.bits}-bit weights already; {advice}"
                )
