"""Reading Flower records that come from another party: nothing is believed before it is checked."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy

from offsite_fl.errors import WireError

# numpy pads its header to a multiple of 64 bytes; ours hold a shape of at most a few dimensions.
MAX_HEADER_BYTES = 1024
MAX_TEXT = 2000

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """The records of one kind by key.

    Flower's own views (``content.array_records``) refer to themselves and to the content, so each use of one keeps the
    whole message in memory until Python looks for cycles.
    """
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def only_arrays(content: RecordDict) -> tuple[str, ArrayRecord]:
    """Key and value of the one ArrayRecord of a message."""
    return _only(content, ArrayRecord)


def only_metrics(content: RecordDict) -> tuple[str, MetricRecord]:
    """Key and value of the one MetricRecord of a message."""
    return _only(content, MetricRecord)


def only_config(content: RecordDict) -> tuple[str, ConfigRecord]:
    """Key and value of the one ConfigRecord of a message."""
    return _only(content, ConfigRecord)


def _only(content: RecordDict, kind: type[Record]) -> tuple[str, Record]:
    records = records_of(content, kind)
    if len(records) != 1:
        raise WireError(f"expected exactly one {kind.__name__}, found {len(records)}")
    return next(iter(records.items()))


def numpy_array(array: Array, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The values of ``array`` after its type, shape and size were found to be what they must be.

    Shares memory with the message (read-only). ``WireError`` names the tensor and what differs. Both what the record
    says about itself and the header inside its bytes are held to ``dtype`` and ``shape``, so no memory is taken for
    a declared size.
    """
    if array.stype != "numpy.ndarray":
        raise WireError(f"tensor {name!r} has serialisation {_short(array.stype)}, expected 'numpy.ndarray'")
    if array.dtype != dtype:
        raise WireError(f"tensor {name!r} has dtype {_short(array.dtype)}, expected {dtype}")
    if tuple(array.shape) != shape:
        raise WireError(f"tensor {name!r} has shape {_short(tuple(array.shape))}, expected {shape}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size < len(array.data) <= size + MAX_HEADER_BYTES:
        raise WireError(f"tensor {name!r} has {len(array.data)} bytes, {size} and a header are expected")
    try:
        return _values(array.data, dtype, shape)
    except (ValueError, TypeError, SyntaxError) as error:
        raise WireError(f"tensor {name!r} holds damaged bytes: {_short(str(error))}") from error


def _values(data: bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    stream = BytesIO(data[:MAX_HEADER_BYTES])
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    found_shape, fortran, found_dtype = read(stream)
    if found_dtype != np.dtype(dtype) or tuple(found_shape) != shape:
        raise ValueError(f"the header says {found_dtype} {found_shape}")
    values = np.frombuffer(data, dtype=found_dtype, count=math.prod(shape), offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def text(value: object, what: str) -> str:
    """A short text from another party, without control characters, fit for a log line."""
    if not isinstance(value, str):
        raise WireError(f"{what} must be text, got {_short(value)}")
    printable = "".join(c if c.isprintable() else " " for c in value[:MAX_TEXT])
    return " ".join(printable.split())


def texts(value: object, what: str) -> list[str]:
    """A list of short texts from another party."""
    if not isinstance(value, list):
        raise WireError(f"{what} must be a list of texts, got {_short(value)}")
    return [text(item, what) for item in value]


def flag(value: object, what: str) -> bool:
    """A truth value from another party."""
    if not isinstance(value, bool):
        raise WireError(f"{what} must be true or false, got {_short(value)}")
    return value


def count_bytes(content: RecordDict) -> dict[str, int]:
    """Bytes of the records of a message by kind: ``arrays``, ``metrics`` and ``config``; keys are counted too.

    Flower's own ``count_bytes`` raises on empty texts and lists.
    """
    arrays = sum(len(key) + len(array.data) for key, array in _entries(content, ArrayRecord))
    metrics = sum(_scalar_bytes(key, value) for key, value in _entries(content, MetricRecord))
    config = sum(_scalar_bytes(key, value) for key, value in _entries(content, ConfigRecord))
    return {"arrays": arrays, "metrics": metrics, "config": config}


def _entries(content: RecordDict, kind: type[Record]) -> list[tuple[str, Any]]:
    return [entry for record in records_of(content, kind).values() for entry in record.items()]


def _scalar_bytes(key: str, value: Any) -> int:
    items = value if isinstance(value, list) else [value]
    return len(key) + sum(len(v) if isinstance(v, (str, bytes)) else 1 if isinstance(v, bool) else 8 for v in items)


def _short(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."
