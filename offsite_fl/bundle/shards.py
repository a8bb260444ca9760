"""The header of a safetensors shard, read by ourselves and held against the manifest before anything is mapped.

A safetensors file is 8 bytes of header length (little endian), the header (JSON: name to dtype, shape and the span
``data_offsets`` within the data), then the data. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite_fl.bundle.files import open_plain
from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.manifest import ShardEntry, TensorEntry, show
from offsite_fl.errors import BundleError


def check_shard(path: Path, entry: ShardEntry, limits: Limits, where: str) -> None:
    """Check that the header of the shard at ``path`` declares exactly the tensors of ``entry``.

    Names, dtypes and shapes must be those of the manifest, and the spans must cover the data without gap or overlap.
    Only the header is read, at most ``limits.max_header_bytes``.
    """
    with open_plain(path, where) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(limits.max_header_bytes, entry.bytes - 8):
            raise BundleError(
                f"{where}: {entry.file} declares a header of {length} bytes in a file of {entry.bytes}; the limit is "
                f"{limits.max_header_bytes}"
            )
        text = file.read(length)
    header = _parse(text, entry.file, where)
    if set(header) != set(entry.tensors):
        odd = sorted(set(header) ^ set(entry.tensors))
        raise BundleError(f"{where}: {entry.file} and the manifest don't list the same tensors, e.g. {show(odd[0])}")
    _check_spans(header, entry, entry.bytes - 8 - length, where)


def _parse(text: bytes, name: str, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key is repeated")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: the header of {name} is damaged: {show(str(error))}") from error
    if not isinstance(header, dict):
        raise BundleError(f"{where}: the header of {name} isn't a JSON object")
    return header


def _check_spans(header: Mapping[str, Any], entry: ShardEntry, data_bytes: int, where: str) -> None:
    spans: list[tuple[int, int]] = []
    for name, declared in entry.tensors.items():
        start, end = _span(header[name], name, declared, f"{where}: {entry.file}")
        spans.append((start, end))
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise BundleError(f"{where}: the tensors of {entry.file} overlap or leave a gap at byte {at} of the data")
        at = end
    if at != data_bytes:
        raise BundleError(f"{where}: the tensors of {entry.file} take {at} bytes, the file holds {data_bytes}")


def _span(found: Any, name: str, declared: TensorEntry, where: str) -> tuple[int, int]:
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"{where}: the header's entry of {name} must hold dtype, shape and data_offsets")
    if (found["dtype"], found["shape"]) != (declared.dtype, list(declared.shape)):
        raise BundleError(
            f"{where}: {name} is {show(found['dtype'])} {show(found['shape'])} in the file but {declared.dtype} "
            f"{list(declared.shape)} in the manifest"
        )
    span = found["data_offsets"]
    whole = isinstance(span, list) and len(span) == 2 and all(type(offset) is int and offset >= 0 for offset in span)
    if not whole or span[1] - span[0] != declared.bytes:
        raise BundleError(f"{where}: {name} has data_offsets {show(span)} where it takes {declared.bytes} bytes")
    return span[0], span[1]
