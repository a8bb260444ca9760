"""Take the adapter out of the full model by slot name, and put new values back: all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from offsite_fl.errors import UpdateError
from offsite_fl.models.blocks import Blocks, block_list
from offsite_fl.models.head import head_parameters


def adapter_tensors(
    model: nn.Module, blocks: Blocks, adapter_indices: Sequence[int], head: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the model's own parameters of the adapter, named ``adapter.{k}.{path inside the block}``.

    ``k`` counts the adapter's blocks in forward order from 0, whatever their place in the full model. Behind them come
    those of the ``head``, ``adapter.head.{path}``. The tensors are the live parameters, not copies.
    """
    stack = block_list(model, blocks)
    inside = {
        f"adapter.{slot}.{path}": parameter
        for slot, index in enumerate(sorted(adapter_indices))
        for path, parameter in stack[index].named_parameters()
    }
    return inside | head_parameters(model, head)


def plug_in(
    model: nn.Module,
    blocks: Blocks,
    adapter_indices: Sequence[int],
    tensors: Mapping[str, torch.Tensor],
    head: Sequence[str] = (),
) -> None:
    """Write new adapter values, those of the ``head`` with them, into the full model, in place; nothing else changes.

    Values are cast to the dtype and device of the parameters they replace, which stay the same objects, so ties and
    optimisers hold.

    Raises
    ------
    UpdateError
        If a name is unknown or missing, or a value has the wrong shape or kind or isn't finite (also after the cast).
        The message names the tensor, and the model is as it was.
    """
    targets = adapter_tensors(model, blocks, adapter_indices, head)
    values = _checked(targets, tensors)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


@contextmanager
def swapped_in(
    model: nn.Module,
    blocks: Blocks,
    adapter_indices: Sequence[int],
    tensors: Mapping[str, torch.Tensor],
    head: Sequence[str] = (),
) -> Iterator[None]:
    """Plug ``tensors`` in for the length of a ``with`` block, then restore the old values bit for bit."""
    targets = adapter_tensors(model, blocks, adapter_indices, head)
    before = {name: parameter.detach().clone() for name, parameter in targets.items()}
    plug_in(model, blocks, adapter_indices, tensors, head)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in targets.items():
                parameter.copy_(before[name])


def _checked(targets: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` cast to their targets' dtype and device, or raise for the first that doesn't fit."""
    _check_names(targets, tensors)
    values = {}
    for name, target in targets.items():
        value = tensors[name]
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise UpdateError(f"{name} should be a tensor with values, not {_kind(value)}")
        if not value.is_floating_point():
            raise UpdateError(f"{name} has dtype {value.dtype}; adapter values are floating point, like {target.dtype}")
        if value.shape != target.shape:
            raise UpdateError(f"{name} has shape {tuple(value.shape)} where the model has {tuple(target.shape)}")
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise UpdateError(f"{name} holds {bad} value(s) that aren't finite, of {value.numel()}")
        cast = value.detach().to(device=target.device, dtype=target.dtype)
        if not torch.isfinite(cast).all():
            raise UpdateError(f"{name} holds values too large for the model's {target.dtype}")
        values[name] = cast
    return values


def _check_names(targets: Mapping[str, object], tensors: Mapping[str, object]) -> None:
    unknown = sorted(set(tensors) - set(targets), key=str)
    missing = [name for name in targets if name not in tensors]
    kinds = (("unknown", unknown), ("missing", missing))
    wrong = [f"{kind}: {_some(names)}" for kind, names in kinds if names]
    if wrong:
        raise UpdateError(f"the update doesn't fit the adapter of {len(targets)} tensors; {'; '.join(wrong)}")


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more


def _kind(value: object) -> str:
    return "a meta tensor" if isinstance(value, torch.Tensor) else type(value).__name__
