"""A patch of the emulator in one message, beside the fingerprints of the public examples that it was made with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from offsite_fl.config import LoraOptions, from_mapping, to_mapping
from offsite_fl.data.fingerprints import Fingerprints
from offsite_fl.errors import ConfigError, WireError
from offsite_fl.patch import Patch
from offsite_fl.tuning.lora import A, B
from offsite_fl.wire import names
from offsite_fl.wire.records import numpy_array, only_arrays, only_config, text

# An array's shape comes from outside; what it may ask for is bounded by the bytes that are really there.
_DIMENSIONS = 2


@dataclass(frozen=True)
class PatchMessage:
    """A patch, the digest that its sender gave it, and fingerprints of the public examples it was aligned on."""

    patch: Patch
    digest: str
    public: Fingerprints


def make_patch(patch: Patch, public: Fingerprints) -> RecordDict:
    """The content of a message with ``patch`` in it, fp32 whatever the run's codec: it must arrive to the bit."""
    arrays = {name: Array(tensor.numpy()) for name, tensor in patch.tensors.items()}
    arrays[names.PUBLIC] = Array(public)
    options = {k: v for k, v in to_mapping(patch.options, names.PATCH_LORA).items() if v != ""}
    config = ConfigRecord({names.DIGEST: patch.bundle, names.PATCH: patch.digest, **options})
    return RecordDict({names.ARRAYS: ArrayRecord(arrays), names.CONFIG: config})


def read_patch(content: RecordDict) -> PatchMessage:
    """What :func:`make_patch` packed; ``WireError`` says what isn't as it must be.

    Each factor has the rank that the options name, so that nobody takes memory for a rank that isn't there. That the
    factors fit the emulator is found out when they are put into it, and their digest by who keeps them.
    """
    arrays, config = only_arrays(content)[1], only_config(content)[1]
    if names.PUBLIC not in arrays:
        raise WireError(f"a patch comes with an array {names.PUBLIC!r} of the public examples' fingerprints")
    tensors = {
        name: torch.from_numpy(numpy_array(array, name, "float32", _shape(name, array, _DIMENSIONS)).copy())
        for name, array in arrays.items()
        if name != names.PUBLIC
    }
    public = numpy_array(arrays[names.PUBLIC], names.PUBLIC, "uint64", _shape(names.PUBLIC, arrays[names.PUBLIC], 1))
    try:
        options = from_mapping(LoraOptions, dict(config), names.PATCH_LORA)
    except ConfigError as error:
        raise WireError(f"the patch's options: {error}") from error
    for name, tensor in tensors.items():
        _check_rank(name, tuple(tensor.shape), options.rank)
    patch = Patch(tensors, text(config.get(names.DIGEST), names.DIGEST), options)
    return PatchMessage(patch, text(config.get(names.PATCH), names.PATCH), np.array(public))


def _check_rank(name: str, shape: tuple[int, ...], rank: int) -> None:
    axis = 0 if name.endswith(A) else 1 if name.endswith(B) else None
    if axis is None:
        raise WireError(f"tensor {ascii(name)[:120]} is no LoRA factor: their names end in {A!r} or {B!r}")
    if shape[axis] != rank:
        raise WireError(f"tensor {name!r} has rank {shape[axis]}, the patch's options say {rank}")


def _shape(name: str, array: Array, dimensions: int) -> tuple[int, ...]:
    shape = tuple(array.shape)
    if len(shape) != dimensions or min(shape) < 0:
        raise WireError(f"tensor {name!r} has {len(shape)} dimensions, expected {dimensions}")
    return shape
