"""Weighted sums of replies in fp64, by tensor name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, RecordDict

from offsite_fl.wire.records import only_arrays, only_metrics

Doubles = dict[str, npt.NDArray[np.float64]]


def combination(contents: Sequence[RecordDict], weights: Sequence[float], names: Iterable[str]) -> Doubles:
    """``sum_i weights[i] * replies[i]`` of each tensor in ``names``."""
    records = [only_arrays(content)[1] for content in contents]
    sums: Doubles = {}
    for name in names:
        total = weights[0] * records[0][name].numpy().astype(np.float64)
        for weight, record in zip(weights[1:], records[1:], strict=True):
            total += weight * record[name].numpy().astype(np.float64)
        sums[name] = np.asarray(total)
    return sums


def moved(arrays: ArrayRecord, share: float, sums: Doubles) -> ArrayRecord:
    """``share * arrays + sums`` in fp32, under the names of ``arrays``. A share of 0 takes ``sums`` as they are."""
    values = {n: sums[n] if share == 0 else share * a.numpy().astype(np.float64) + sums[n] for n, a in arrays.items()}
    return as_record(values)


def as_record(values: Mapping[str, npt.NDArray[np.float64]]) -> ArrayRecord:
    """The values as fp32 arrays under the same names."""
    return ArrayRecord({name: Array(np.asarray(value, dtype=np.float32)) for name, value in values.items()})


def numbers(contents: Sequence[RecordDict], key: str) -> list[float]:
    """The metric ``key`` of each reply."""
    return [float(only_metrics(content)[1][key]) for content in contents]  # type: ignore[arg-type]
