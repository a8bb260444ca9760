"""What a message may make its reader take memory for: what it brought itself, or what can't be much."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flwr.app import Array

from offsite_fl.errors import WireError
from offsite_fl.tuning.lora import check_rank


def check_backed(arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Hold LoRA factors of ``shapes``, which follow from a rank that a message names, to what is in its ``arrays``.

    Made before any factor is: a rank is one number, and factors take memory in proportion to it. ``WireError`` names a
    factor that came with another shape, or with less than the byte a value that the shortest codec takes. Where factors
    didn't come, since they are made at the site, the rank is bounded by what the linears can have (``ConfigError``).
    """
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None:
            continue
        if tuple(array.shape) != shape:
            raise WireError(f"tensor {name!r} has shape {ascii(tuple(array.shape))[:120]}, expected {shape}")
        if len(array.data) < math.prod(shape):
            raise WireError(f"tensor {name!r} has {len(array.data)} bytes, its shape {shape} takes more")
    if shapes.keys() - arrays.keys():
        check_rank(shapes)
