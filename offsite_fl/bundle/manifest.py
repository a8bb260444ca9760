"""The manifest: what a bundle holds, in canonical JSON. Its SHA-256 is the bundle's digest, its name everywhere."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offsite_fl.version import __version__

# 2: a head that is trained, or an image processor. Bundles without either are still written as 1.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
KINDS = ("adapter", "emulator", "shared")
TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"
PROCESSOR_CONFIG = "processor/preprocessor_config.json"

# The names safetensors gives its dtypes, and their width in bytes. Closed: anything else is refused.
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
FLOAT_DTYPES = ("F32", "F16", "BF16")

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorEntry:
    """What the manifest declares of one tensor: a safetensors dtype name and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its name relative to the folder, with forward slashes, its exact size and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A safetensors file that holds tensors of one ``kind`` (adapter, emulator or shared) and nothing else."""

    kind: str
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a bundle. ``plan`` is the JSON form of a ``NetworkPlan``."""

    plan: dict[str, Any]
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    library_version: str = __version__
    format_version: int = 1

    @property
    def processor_config(self) -> str:
        """The file that says which tokenizer or image processor there is."""
        held = {entry.file for entry in self.files}
        return PROCESSOR_CONFIG if PROCESSOR_CONFIG in held else TOKENIZER_CONFIG

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8, one form for one content."""
        shards = [
            {
                "file": shard.file,
                "kind": shard.kind,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "tensors": {n: {"dtype": t.dtype, "shape": list(t.shape)} for n, t in shard.tensors.items()},
            }
            for shard in self.shards
        ]
        return canonical(
            {
                "format_version": self.format_version,
                "library_version": self.library_version,
                "plan": self.plan,
                "shards": shards,
                "files": [{"file": f.file, "bytes": f.bytes, "sha256": f.sha256} for f in self.files],
            }
        )

    def entries(self) -> tuple[FileEntry, ...]:
        """Every file but the manifest itself."""
        return self.shards + self.files

    def tensors(self) -> dict[str, TensorEntry]:
        """All declared tensors by slot name."""
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}


def canonical(value: Any) -> bytes:
    """``value`` as canonical JSON bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(manifest: bytes) -> str:
    """The digest of a bundle: SHA-256 of its manifest's bytes, in hex."""
    return hashlib.sha256(manifest).hexdigest()


def is_digest(text: object) -> bool:
    """Whether ``text`` has the form of a digest: 64 lower-case hex digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def kind_of(slot: str) -> str:
    """The kind of tensor a slot name stands for: its first part."""
    return slot.partition(".")[0]


def show(value: object) -> str:
    """A value from another party for an error message: escaped (no terminal codes) and short."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
