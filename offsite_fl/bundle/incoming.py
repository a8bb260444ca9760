"""A bundle on its way in: its files as they arrive at one node, kept on disk until they are whole."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_fl.bundle.files import discard, plain_size, read_plain, write_synced
from offsite_fl.bundle.manifest import MANIFEST, Manifest, digest_of, show
from offsite_fl.bundle.parse import read_manifest
from offsite_fl.bundle.read import Bundle
from offsite_fl.bundle.verify import check_plan
from offsite_fl.errors import BundleError
from offsite_fl.sizes import human_bytes

if TYPE_CHECKING:
    from offsite_fl.bundle.cache import Cache

log = logging.getLogger("offsite_fl.cache")


class Incoming:
    """Files of one bundle as they arrive at one node, in any order after the manifest, over any number of processes."""

    def __init__(self, cache: Cache, digest: str, folder: Path) -> None:
        self.cache, self.digest, self.folder = cache, digest, folder
        self._manifest: Manifest | None = None

    @property
    def where(self) -> str:
        """What error messages call this transfer."""
        return f"bundle {self.digest[:12]} being received"

    def manifest(self) -> Manifest | None:
        """The manifest, or None while it hasn't arrived."""
        path = self.folder / MANIFEST
        if self._manifest is None and path.is_file():
            data = read_plain(path, self.cache.limits.max_manifest_bytes, self.where)
            if digest_of(data) != self.digest:  # only a broken disk does this
                self._forget()
                return None
            self._manifest = read_manifest(data, self.cache.limits, self.where)
        return self._manifest

    def missing(self) -> list[str]:
        """Names of the files that are still to come; just the manifest's while that is missing."""
        manifest = self.manifest()
        if manifest is None:
            return [MANIFEST]
        return [entry.file for entry in manifest.entries() if not self._held(entry.file, entry.bytes)]

    def store(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Keep one file if it is the one that the manifest lists; the manifest comes first.

        Sending a file again is fine. ``BundleError`` if the manifest isn't that of the digest or asks for more than the
        limits or the disk allow, if a file isn't listed, or if its size or SHA-256 isn't the listed one; nothing is
        kept then.
        """
        view = memoryview(data).cast("B")
        if name == MANIFEST:
            return self._store_manifest(bytes(view))
        manifest = self.manifest()
        if manifest is None:
            raise BundleError(f"{self.where}: {show(name)} came before {MANIFEST}, which must be the first file")
        entry = next((entry for entry in manifest.entries() if entry.file == name), None)
        if entry is None:
            raise BundleError(f"{self.where}: {show(name)} isn't a file of the bundle")
        if len(view) != entry.bytes:
            raise BundleError(f"{self.where}: {name} came with {len(view)} bytes, the manifest says {entry.bytes}")
        if hashlib.sha256(view).hexdigest() != entry.sha256:
            raise BundleError(f"{self.where}: {name} was damaged on its way: its SHA-256 isn't the manifest's")
        if not self._held(name, entry.bytes):
            self._keep(name, view)
        return None

    def commit(self) -> Bundle:
        """Verify everything, move it into the cache and open it; fine if another process was faster."""
        held = self.cache.find(self.digest)
        if held is None:
            # Holding the lease before the folder appears keeps other processes from evicting it in between.
            with self.cache.lease(self.digest):
                failure = self._move_in()
                held = self.cache.find(self.digest)
            if held is None:
                raise failure or BundleError(f"{self.where} was damaged by the disk as soon as it was written")
        self._forget()
        return held

    def _move_in(self) -> BundleError | None:
        """Rename the verified folder into the cache; a failure is returned, for another process may have succeeded."""
        missing = self.missing()
        if missing:
            return BundleError(f"{self.where} isn't complete: {len(missing)} file(s) to come, e.g. {missing[0]}")
        for leftover in self.folder.rglob(".*"):  # of a process that died while it wrote
            leftover.unlink(missing_ok=True)
        try:
            self.cache.adopt(self.folder, self.digest)
        except BundleError as error:
            self._forget()  # each file was right when it came, so the disk or the bundle itself is bad
            return error
        except OSError as error:
            return self._failed("can't be moved into the cache", error)
        return None

    def _forget(self) -> None:
        discard(self.folder)
        self._manifest = None

    def _store_manifest(self, data: bytes) -> None:
        if digest_of(data) != self.digest:
            raise BundleError(f"{self.where}: the manifest that came has digest {digest_of(data)}")
        manifest = read_manifest(data, self.cache.limits, self.where)
        check_plan(manifest, self.cache.limits, self.where)
        total = sum(entry.bytes for entry in manifest.entries())
        if total > self.cache.max_bytes:
            self.cache.make_room(total)  # raises: it can never fit
        free = shutil.disk_usage(self.cache.root).free
        if total > free:
            raise BundleError(f"{self.where} needs {human_bytes(total)}, the disk has {human_bytes(free)} free")
        self._keep(MANIFEST, data)
        self._manifest = manifest

    def _keep(self, name: str, data: bytes | memoryview) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_synced(path, data)
            os.utime(self.folder)  # the transfer is alive, see Cache.clean
        except OSError as error:
            raise self._failed(f"{name} can't be kept", error) from error

    def _failed(self, what: str, error: OSError) -> BundleError:
        # The folder stays here: a site's error goes to the server.
        log.error("%s, %s in %s: %s", self.where, what, self.cache.root, error)
        return BundleError(f"{self.where}: {what}: {error.strerror or type(error).__name__}")

    def _held(self, name: str, size: int) -> bool:
        # Files appear by rename after they were checked, so the right size is enough here; commit hashes them all.
        path = self.folder / name
        return path.exists() and plain_size(path, self.where) == size
