"""Open a bundle: every check that can fail comes before any tensor is mapped, and nothing is ever changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from offsite_fl.bundle.files import read_plain
from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.manifest import KINDS, MANIFEST, FileEntry, Manifest, ShardEntry, digest_of
from offsite_fl.bundle.parse import read_manifest
from offsite_fl.bundle.verify import check_plan, check_processor_files, verify_files
from offsite_fl.errors import BundleError
from offsite_fl.models.network import NetworkPlan
from offsite_fl.models.processors import Processor, need_tokenizer, open_processor


class BundleTensors(Mapping[str, torch.Tensor]):
    """Slot name to tensor, read-only and lazy: shards are memory-mapped when one of their tensors is first asked for.

    A tensor is a view of the mapped file: memory is taken page by page as values are used, shared with every other
    process that maps the same file. Writing into one changes a private copy, never the file.
    """

    def __init__(self, folder: Path, shards: tuple[ShardEntry, ...], lease: object = None) -> None:
        self._folder, self._lease = folder, lease
        self._shard_of = {name: shard for shard in shards for name in shard.tensors}
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        shard = self._shard_of[name]
        try:
            if shard.file not in self._open:
                self._open[shard.file] = safe_open(self._folder / shard.file, framework="pt")
            tensor: torch.Tensor = self._open[shard.file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"bundle {self._folder}: {shard.file} can't be read any more: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk under one ``digest``: adapter, emulator, shared tensors, tokenizer or image processor.

    Made by :func:`open_bundle`, ``write_bundle`` or the cache; a bundle from the cache isn't evicted while this object
    or its tensors are alive.
    """

    path: Path
    digest: str
    manifest: Manifest
    plan: NetworkPlan
    manifest_size: int = field(repr=False)
    lease: object = field(default=None, repr=False, compare=False)

    def tensors(self) -> BundleTensors:
        """All tensors by slot name, lazily, memory-mapped."""
        return BundleTensors(self.path, self.manifest.shards, self.lease)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; ``ModelError`` if there is an image processor instead."""
        return need_tokenizer(self.processor())

    def processor(self) -> Processor:
        """The tokenizer or image processor, from the bundle's own files; nothing is fetched, no foreign code runs."""
        folder = self.manifest.processor_config.partition("/")[0]
        try:
            return open_processor(str(self.path / folder), self.plan.task, local_files_only=True)
        except Exception as error:  # foreign files reach many parsers; all their complaints mean the same here
            raise BundleError(f"bundle {self.path}: transformers can't read the {folder}: {error}") from error

    def files(self) -> list[tuple[str, int, str]]:
        """``(relative name, bytes, sha256)`` of every file, the manifest first: what a receiver needs."""
        first = FileEntry(MANIFEST, self.manifest_size, self.digest)
        return [(entry.file, entry.bytes, entry.sha256) for entry in (first, *self.manifest.entries())]

    def read_file(self, name: str) -> bytes:
        """Bytes of one of :meth:`files`, checked against its size and SHA-256."""
        known = {entry: (size, sha256) for entry, size, sha256 in self.files()}
        if name not in known:
            raise BundleError(f"bundle {self.path} has no file {name!r}; it has {', '.join(known)}")
        size, sha256 = known[name]
        data = read_plain(self.path / name, size, f"bundle {self.path}")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise BundleError(f"bundle {self.path}: {name} has changed since the bundle was opened")
        return data

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on disk by kind: ``adapter``, ``emulator``, ``shared``, and ``other`` (manifest, tokenizer...)."""
        sizes = dict.fromkeys((*KINDS, "other"), 0)
        for shard in self.manifest.shards:
            sizes[shard.kind] += shard.bytes
        sizes["other"] = self.manifest_size + sum(entry.bytes for entry in self.manifest.files)
        return sizes

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.bytes_by_kind().values())


def open_bundle(
    path: str | os.PathLike[str],
    *,
    limits: Limits | None = None,
    digest: str | None = None,
    verify: bool = True,
    lease: object = None,
) -> Bundle:
    """Open the bundle in folder ``path`` after checking all of it.

    Checked in this order: the manifest's size, form and version, file names, declared sizes against ``limits``, the
    files themselves (all there, nothing else, exact sizes, SHA-256), the shards' headers, and that the tensors are
    exactly those that the network plan needs. No memory is taken for tensors.

    Parameters
    ----------
    path
        The bundle's folder.
    limits
        How large the bundle may claim to be; the defaults of :class:`Limits` if None.
    digest
        The digest that the bundle must have. Without it a *forged* manifest can't be told from a true one: whoever
        hands over a bundle tells its digest by another way.
    verify
        False skips only the SHA-256 of the files, for a folder that this process has verified before.
    lease
        Kept alive as long as the bundle; the cache puts its lock here.

    Raises
    ------
    BundleError
        Says which check failed, where, and what would be right. Nothing on disk is touched.
    """
    folder, limits = Path(path), limits or Limits()
    where = f"bundle {folder}"
    if not folder.is_dir():
        raise BundleError(f"{where} doesn't exist or isn't a folder")
    data = read_plain(folder / MANIFEST, limits.max_manifest_bytes, where)
    if digest is not None and digest_of(data) != digest:
        raise BundleError(f"{where} has digest {digest_of(data)}, expected {digest}: it isn't the bundle asked for")
    manifest = read_manifest(data, limits, where)
    verify_files(folder, manifest, limits, where, hashes=verify)
    check_processor_files(folder, manifest, limits, where)
    plan = check_plan(manifest, limits, where)
    return Bundle(folder, digest_of(data), manifest, plan, len(data), lease)
