"""Read a manifest that another party wrote. Nothing in it is believed.

Sizes, keys, types, file names and declared tensor sizes are checked against
:class:`~offsite_fl.bundle.limits.Limits` before anyone acts on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.manifest import (
    DTYPE_BYTES,
    FORMAT_VERSION,
    MANIFEST,
    PROCESSOR_CONFIG,
    TOKENIZER_CONFIG,
    FileEntry,
    Manifest,
    ShardEntry,
    TensorEntry,
    canonical,
    is_digest,
    kind_of,
    show,
)
from offsite_fl.errors import BundleError
from offsite_fl.sizes import human_bytes
from offsite_fl.version import __version__

_SHARD = re.compile(r"shards/(adapter|emulator|shared)-[0-9]{5}\.safetensors")
_TOKENIZER_FILE = re.compile(
    r"tokenizer/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.(?:json|txt|model|jinja)|processor/preprocessor_config\.json"
)
_SLOT = re.compile(r"(?:(?:adapter|emulator)\.[0-9]{1,6}|adapter\.head|shared)(?:\.[A-Za-z0-9_-]{1,100}){1,40}")
_KEYS = {
    "manifest": {"format_version", "library_version", "plan", "shards", "files"},
    "shard": {"file", "kind", "bytes", "sha256", "tensors"},
    "file": {"file", "bytes", "sha256"},
    "tensor": {"dtype", "shape"},
}


def read_manifest(data: bytes, limits: Limits | None = None, where: str = "bundle") -> Manifest:
    """Read and check a manifest's bytes; ``BundleError`` names ``where``, the fault and what would be right."""
    limits = limits or Limits()
    if len(data) > limits.max_manifest_bytes:
        raise BundleError(
            f"{where}: {MANIFEST} has {human_bytes(len(data))}, the limit is {human_bytes(limits.max_manifest_bytes)}"
        )
    raw = _parse(data, limits, where)
    _check_version(raw, where)
    _check_keys(raw, "manifest", where)
    if not _is_canonical(raw, data):
        raise BundleError(f"{where}: {MANIFEST} isn't in canonical form (sorted keys, no spaces, no repeated keys)")
    reader = _Reader(limits, where)
    manifest = Manifest(
        plan=reader.table(raw["plan"], "plan"),
        shards=tuple(reader.shard(entry) for entry in reader.items(raw["shards"], "shards", limits.max_shards)),
        files=tuple(
            reader.tokenizer_file(entry) for entry in reader.items(raw["files"], "files", limits.max_tokenizer_files)
        ),
        library_version=reader.text(raw["library_version"], "library_version"),
        format_version=raw["format_version"],
    )
    reader.check_totals(manifest)
    return manifest


def _parse(data: bytes, limits: Limits, where: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} isn't JSON")

    try:
        raw = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST} is damaged, it isn't JSON: {show(str(error))}") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{where}: {MANIFEST} must hold a JSON object, it holds a {type(raw).__name__}")
    if not _shallow(raw, limits.max_depth):
        raise BundleError(f"{where}: {MANIFEST} is nested deeper than {limits.max_depth} levels")
    return raw


def _is_canonical(raw: dict[str, Any], data: bytes) -> bool:
    try:
        return canonical(raw) == data
    except ValueError:  # numbers that overflow, half characters: JSON can carry them, canonical JSON can't
        return False


def _shallow(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not any(isinstance(inner, (dict, list)) for inner in level)


def _check_version(raw: dict[str, Any], where: str) -> None:
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{where}: {MANIFEST} has format_version {show(version)}, it must be a whole number from 1")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{where} has format {version}, written by offsite-fl {show(raw.get('library_version'))}; this is "
            f"offsite-fl {__version__}, which reads formats up to {FORMAT_VERSION}: upgrade offsite-fl to open it"
        )


def _check_keys(raw: Mapping[str, Any], what: str, where: str) -> None:
    unknown, missing = sorted(set(raw) - _KEYS[what]), sorted(_KEYS[what] - set(raw))
    if unknown:
        raise BundleError(f"{where}: unknown key {show(unknown[0])} in a {what} entry; known: {sorted(_KEYS[what])}")
    if missing:
        raise BundleError(f"{where}: key {missing[0]!r} is missing from a {what} entry")


class _Reader:
    """Turns parsed JSON into entries, checking types, names and declared sizes one by one."""

    def __init__(self, limits: Limits, where: str) -> None:
        self.limits, self.where = limits, where
        self.slots: set[str] = set()

    def fail(self, message: str) -> BundleError:
        return BundleError(f"{self.where}: {message}")

    def table(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(f"{what} must be a JSON object, got {show(value)}")
        return value

    def items(self, value: Any, what: str, most: int) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise self.fail(f"{what} must be a JSON list, got {show(value)}")
        if len(value) > most:
            raise self.fail(f"{len(value)} {what} are declared, the limit is {most}")
        return [self.table(entry, f"an entry of {what}") for entry in value]

    def text(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or len(value) > 200:
            raise self.fail(f"{what} must be a short text, got {show(value)}")
        return value

    def size(self, value: Any, what: str, most: int) -> int:
        if type(value) is not int or value < 0:
            raise self.fail(f"{what} must be a whole number from 0, got {show(value)}")
        if value > most:
            raise self.fail(f"{what} is declared as {human_bytes(value)}, the limit is {human_bytes(most)}")
        return value

    def sha256(self, value: Any, what: str) -> str:
        if not is_digest(value):
            raise self.fail(f"sha256 of {what} must be 64 hex digits, got {show(value)}")
        return str(value)

    def name(self, value: Any, pattern: re.Pattern[str], what: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value) or ".." in value:
            raise self.fail(
                f"file name {show(value)} isn't allowed for a {what}; it must match {pattern.pattern} "
                "(inside the bundle, no '..', no absolute path, no backslash)"
            )
        return value

    def shard(self, raw: dict[str, Any]) -> ShardEntry:
        _check_keys(raw, "shard", self.where)
        name = self.name(raw["file"], _SHARD, "shard")
        kind = name.removeprefix("shards/").partition("-")[0]
        if raw["kind"] != kind:
            raise self.fail(f"{name} is declared as kind {show(raw['kind'])}, by its name it is {kind!r}")
        tensors = {
            slot: self.tensor(slot, entry, kind) for slot, entry in self.table(raw["tensors"], "tensors").items()
        }
        size = self.size(raw["bytes"], name, self.limits.max_file_bytes)
        needed = sum(entry.bytes for entry in tensors.values())
        if not needed <= size <= needed + self.limits.max_header_bytes + 8:
            raise self.fail(
                f"{name} is declared with {human_bytes(size)} but its tensors need {human_bytes(needed)} and a header"
            )
        return ShardEntry(name, size, self.sha256(raw["sha256"], name), kind, tensors)

    def tensor(self, slot: str, raw: Any, kind: str) -> TensorEntry:
        if not _SLOT.fullmatch(slot) or kind_of(slot) != kind:
            raise self.fail(f"{show(slot)} isn't a tensor name that a shard of kind {kind!r} can hold")
        if slot in self.slots:
            raise self.fail(f"tensor {slot} is declared in two shards")
        self.slots.add(slot)
        _check_keys(self.table(raw, f"tensor {slot}"), "tensor", self.where)
        if not isinstance(raw["dtype"], str) or raw["dtype"] not in DTYPE_BYTES:
            raise self.fail(f"tensor {slot} has dtype {show(raw['dtype'])}; known: {', '.join(DTYPE_BYTES)}")
        shape, limits = raw["shape"], self.limits
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise self.fail(f"tensor {slot} has shape {show(shape)}, it must be a list of whole numbers from 0")
        if len(shape) > limits.max_dims or any(size > limits.max_dim for size in shape):
            raise self.fail(
                f"tensor {slot} has the absurd shape {show(shape)}; limits are {limits.max_dims} dimensions of "
                f"at most {limits.max_dim}"
            )
        return TensorEntry(raw["dtype"], tuple(shape))

    def tokenizer_file(self, raw: dict[str, Any]) -> FileEntry:
        _check_keys(raw, "file", self.where)
        name = self.name(raw["file"], _TOKENIZER_FILE, "tokenizer file")
        size = self.size(raw["bytes"], name, self.limits.max_tokenizer_bytes)
        return FileEntry(name, size, self.sha256(raw["sha256"], name))

    def check_totals(self, manifest: Manifest) -> None:
        # Names that differ only in case are one file on some disks.
        names = [entry.file.lower() for entry in manifest.entries()]
        if len(set(names)) != len(names):
            raise self.fail("a file is listed twice")
        if len(self.slots) > self.limits.max_tensors:
            raise self.fail(f"{len(self.slots)} tensors are declared, the limit is {self.limits.max_tensors}")
        total = sum(entry.bytes for entry in manifest.entries())
        self.size(total, "the whole bundle", self.limits.max_bytes)
        if PROCESSOR_CONFIG in names:
            if len(manifest.files) > 1:
                raise self.fail(f"{PROCESSOR_CONFIG} must be the only file beside the shards, without a tokenizer")
        elif TOKENIZER_CONFIG not in names:
            raise self.fail(
                f"the tokenizer is missing, or the image processor: neither {TOKENIZER_CONFIG} nor {PROCESSOR_CONFIG} "
                "is listed in the manifest"
            )
