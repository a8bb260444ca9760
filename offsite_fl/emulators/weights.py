"""Copies of a block with other values in its weight matrices, and everything else shared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import copy_structure


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
