"""How adapter values travel: full precision, half precision, or eight bits of the difference to a reference.

Every codec takes fp32 tensors and gives fp32 tensors back, so whatever aggregates them works in fp32. A new codec is
a class with two methods and :func:`register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord

from offsite_fl.errors import WireError
from offsite_fl.registry import Registry
from offsite_fl.wire import names
from offsite_fl.wire.records import numpy_array

Tensors = Mapping[str, torch.Tensor]


class Codec(ABC):
    """One tensor to an array that Flower can carry and back.

    ``dtype`` is the numpy dtype on the wire. What decoding needs besides the array goes into the message's config
    record under ``wire.<key>.<tensor name>``: by name, never by position.
    """

    dtype: ClassVar[str]

    @abstractmethod
    def encode(self, tensor: torch.Tensor, reference: torch.Tensor) -> tuple[npt.NDArray[Any], dict[str, float | str]]:
        """Values for the wire and the settings of this tensor; ``tensor`` and ``reference`` are fp32 on the CPU."""

    @abstractmethod
    def decode(self, values: npt.NDArray[Any], reference: torch.Tensor, setting: Callable[[str], Any]) -> torch.Tensor:
        """The fp32 tensor; ``setting("scale")`` reads what :meth:`encode` noted, None where it isn't there."""


CODECS: Registry[Codec] = Registry("wire codec")


def register(name: str) -> Callable[[type[Codec]], type[Codec]]:
    """Class decorator that files a codec under ``name``."""

    def add(cls: type[Codec]) -> type[Codec]:
        CODECS.register(name)(cls())
        return cls

    return add


@register("fp32")
class Float32(Codec):
    """The values as they are."""

    dtype = "float32"

    def encode(self, tensor: torch.Tensor, reference: torch.Tensor) -> tuple[npt.NDArray[Any], dict[str, float | str]]:
        """See :class:`Codec`."""
        return tensor.numpy(), {}

    def decode(self, values: npt.NDArray[Any], reference: torch.Tensor, setting: Callable[[str], Any]) -> torch.Tensor:
        """See :class:`Codec`."""
        return torch.from_numpy(values.astype(np.float32))


@register("fp16")
class Float16(Codec):
    """Half precision: relative error at most 2**-11, absolute 2**-25 below 2**-14; values to 65504."""

    dtype = "float16"

    def encode(self, tensor: torch.Tensor, reference: torch.Tensor) -> tuple[npt.NDArray[Any], dict[str, float | str]]:
        """See :class:`Codec`."""
        half = tensor.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            largest = float(tensor.abs().max())
            raise WireError(f"a value of {largest:g} doesn't fit fp16 (65504); use codec bf16 or fp32")
        return half.numpy(), {}

    def decode(self, values: npt.NDArray[Any], reference: torch.Tensor, setting: Callable[[str], Any]) -> torch.Tensor:
        """See :class:`Codec`."""
        return torch.from_numpy(values.astype(np.float32))


@register("bf16")
class BFloat16(Codec):
    """The upper half of fp32: relative error at most 2**-8; bf16 values travel bit for bit.

    numpy has no bfloat16, so the bits go as int16 and the true dtype is noted beside them.
    """

    dtype = "int16"

    def encode(self, tensor: torch.Tensor, reference: torch.Tensor) -> tuple[npt.NDArray[Any], dict[str, float | str]]:
        """See :class:`Codec`."""
        return tensor.to(torch.bfloat16).view(torch.int16).numpy(), {"dtype": "bfloat16"}

    def decode(self, values: npt.NDArray[Any], reference: torch.Tensor, setting: Callable[[str], Any]) -> torch.Tensor:
        """See :class:`Codec`."""
        if setting("dtype") != "bfloat16":
            raise WireError(f"int16 bits must be noted as bfloat16, the note says {ascii(setting('dtype'))[:40]}")
        return torch.from_numpy(values.copy()).view(torch.bfloat16).to(torch.float32)


@register("int8")
class Int8(Codec):
    """Eight bits of the difference to the reference, scale ``max|x - reference| / 127`` for each tensor.

    The error is at most half a scale (and fp32 rounding).
    """

    dtype = "int8"

    def encode(self, tensor: torch.Tensor, reference: torch.Tensor) -> tuple[npt.NDArray[Any], dict[str, float | str]]:
        """See :class:`Codec`."""
        # In fp64: the difference of two large fp32 values may overflow, and the scale must not round to zero.
        difference = tensor.double() - reference.double()
        scale = float(difference.abs().max()) / 127 if difference.numel() else 0.0
        if not np.isfinite(scale):
            raise WireError("a value isn't finite")
        steps = difference / scale if scale > 0 else torch.zeros_like(difference)
        return steps.round().clamp(-127, 127).to(torch.int8).numpy(), {"scale": scale}

    def decode(self, values: npt.NDArray[Any], reference: torch.Tensor, setting: Callable[[str], Any]) -> torch.Tensor:
        """See :class:`Codec`."""
        scale = setting("scale")
        if not isinstance(scale, float) or not 0 <= scale < float("inf"):
            raise WireError(f"its scale must be a finite number from 0, got {ascii(scale)[:40]}")
        return (reference.double() + torch.from_numpy(values.astype(np.float64)) * scale).float()


def encode(tensors: Tensors, reference: Tensors, codec: str = "fp32") -> tuple[ArrayRecord, ConfigRecord]:
    """Named tensors to one ArrayRecord, under the same names, and the settings that decoding needs.

    ``reference`` has the same names and shapes: the bundle's own adapter values for a full adapter, zeros for LoRA
    factors. ``WireError`` names a tensor that isn't in it or that the codec can't carry.
    """
    method = CODECS[codec]
    arrays: dict[str, Array] = {}
    settings: dict[str, Any] = {names.CODEC: codec}
    for name, tensor in tensors.items():
        if name not in reference:
            raise WireError(f"tensor {name!r} has no reference; known are {sorted(reference)[:3]}...")
        try:
            values, notes = method.encode(_plain(tensor), _plain(reference[name]))
        except WireError as error:
            raise WireError(f"tensor {name!r} can't travel as {codec}: {error}") from error
        # reshape: ascontiguousarray turns a 0-d array into a 1-d one
        arrays[name] = Array(np.ascontiguousarray(values).reshape(tuple(tensor.shape)))
        settings |= {f"wire.{key}.{name}": value for key, value in notes.items()}
    return ArrayRecord(arrays), ConfigRecord(settings)


def decode(arrays: ArrayRecord, config: ConfigRecord, reference: Tensors, codec: str) -> dict[str, torch.Tensor]:
    """The fp32 tensors that :func:`encode` was given, in the order of ``reference``.

    ``reference`` says what must have come: ``WireError`` names a tensor that is missing, unknown, of the wrong shape
    or dtype, or damaged, and a codec that isn't ``codec``. Whether the values are finite isn't looked at.
    """
    claimed = config.get(names.CODEC, "fp32")
    if claimed != codec:
        raise WireError(f"arrays came as codec {ascii(claimed)[:40]}, expected {codec!r}")
    method = CODECS[codec]
    for what, found in (("missing", reference.keys() - arrays.keys()), ("unknown", arrays.keys() - reference.keys())):
        if found:
            shown = ", ".join(ascii(name)[:120] for name in sorted(found)[:3])
            raise WireError(f"{len(found)} {what} tensor{'s' * (len(found) > 1)}: {shown}")
    tensors = {}
    for name, like in reference.items():
        values = numpy_array(arrays[name], name, method.dtype, tuple(like.shape))
        try:
            tensors[name] = method.decode(values, _plain(like), _setting(config, name))
        except WireError as error:
            raise WireError(f"tensor {name!r}: {error}") from error
    return tensors


def _setting(config: ConfigRecord, name: str) -> Callable[[str], Any]:
    return lambda key: config.get(f"wire.{key}.{name}")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32)
