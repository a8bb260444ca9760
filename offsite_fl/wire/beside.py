"""Tensors that travel beside the adapter in the one array record of a message, told by the beginning of their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord

from offsite_fl.wire import names

Tensors = Mapping[str, torch.Tensor]


def controls(reference: Tensors) -> dict[str, torch.Tensor]:
    """Control variates for the tensors of ``reference``: their names, and the zeros that a codec measures from."""
    return {names.CONTROL + name: torch.zeros_like(value) for name, value in reference.items()}


def control_of(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The control variates among ``tensors`` under the names of the tensors that they belong to."""
    return {n.removeprefix(names.CONTROL): t for n, t in tensors.items() if n.startswith(names.CONTROL)}


def parted(arrays: ArrayRecord) -> tuple[ArrayRecord, ArrayRecord]:
    """The adapter's arrays, and those beside it; both share memory with ``arrays``."""
    beside = {name: array for name, array in arrays.items() if name.startswith(names.CONTROL)}
    if not beside:
        return arrays, ArrayRecord()
    return ArrayRecord({name: array for name, array in arrays.items() if name not in beside}), ArrayRecord(beside)
