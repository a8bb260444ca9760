"""The client's disk cache of bundles, by digest: filled file by file, verified, evicted by least recent use.

Layout under the root (``OFFSITE_FL_CACHE`` or ``~/.cache/offsite-fl``)::

    bundles/<digest>/         verified bundles, each renamed into place whole
    bundles/<digest>.lock     held shared while the bundle is in use; its time is that of last use
    incoming/<digest>-<node>/ files received so far by one node; survives a restart of the process
    trash/                    what was evicted and is being deleted

Flower starts a new process for every message of a deployment, so nothing here lives in memory only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from pathlib import Path

from offsite_fl.bundle.files import discard, sync_tree, tree_bytes
from offsite_fl.bundle.incoming import Incoming
from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.locks import Lease
from offsite_fl.bundle.manifest import is_digest, show
from offsite_fl.bundle.read import Bundle, open_bundle
from offsite_fl.config import CACHE_VARIABLE, cache_root
from offsite_fl.errors import BundleError
from offsite_fl.sizes import GB, human_bytes, parse_bytes

log = logging.getLogger("offsite_fl.cache")

SIZE_VARIABLE = "OFFSITE_FL_CACHE_BYTES"
DEFAULT_BYTES = 20 * GB
STALE_SECONDS = 3 * 24 * 3600.0

# Folders whose files this process has hashed, with the state they were in: a later open needn't hash them again.
_verified: dict[Path, tuple[tuple[str, int, int, int], ...]] = {}


class Cache:
    """Bundles on this machine's disk, safe under several processes.

    Parameters
    ----------
    root
        See :func:`offsite_fl.config.cache_root`.
    max_bytes
        Room for bundles, bytes or text like ``"20GB"``; None reads ``OFFSITE_FL_CACHE_BYTES``, else 20 GB. When a new
        bundle doesn't fit, the least recently used ones that nobody has open are deleted.
    limits
        What a bundle may claim to be, see :class:`~offsite_fl.bundle.limits.Limits`.
    stale_seconds
        Age at which files of an unfinished transfer are deleted.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        max_bytes: int | str | None = None,
        *,
        limits: Limits | None = None,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self.root = cache_root(root)
        size = max_bytes if max_bytes is not None else os.environ.get(SIZE_VARIABLE) or DEFAULT_BYTES
        self.max_bytes = parse_bytes(size) if isinstance(size, str) else size
        self.limits = limits or Limits()
        self.stale_seconds = stale_seconds
        self.bundles, self.incoming, self.trash = (self.root / name for name in ("bundles", "incoming", "trash"))

    def find(self, digest: str) -> Bundle | None:
        """The bundle of this digest, verified, or None if it isn't here.

        Files are hashed on the first open in a process and whenever they look different from then. A copy that fails
        is deleted with a warning, so that it is fetched again.
        """
        folder = self._folder(digest)
        if not folder.is_dir():
            return None
        lease = self.lease(digest)
        if not folder.is_dir():  # evicted between the two looks
            lease.release()
            return None
        try:
            bundle = _open(folder, digest, self.limits, lease)
        except BundleError as error:
            lease.release()
            if not self._evict(digest):
                raise  # another process has it open
            log.warning("the cached bundle was dropped and will be fetched again: %s", error)
            return None
        lease.touch()
        return bundle

    def receiver(self, digest: str, node: str | int) -> Incoming:
        """Begin, or go on with, receiving a bundle for ``node``; also deletes transfers that were given up."""
        self._folder(digest)
        self._make_folders()
        self.clean()
        name = f"{digest}-{hashlib.sha256(str(node).encode()).hexdigest()[:16]}"
        return Incoming(self, digest, self.incoming / name)

    def adopt(self, folder: Path, digest: str) -> None:
        """Verify the bundle in ``folder`` and rename it into the cache; the caller holds a :meth:`lease` on it."""
        state = _state(folder)
        open_bundle(folder, limits=self.limits, digest=digest)
        sync_tree(folder)
        self.make_room(tree_bytes(folder))
        folder.rename(self.bundles / digest)
        _verified[self.bundles / digest] = state

    def digests(self) -> list[str]:
        """Digests of the bundles that are here, the least recently used first."""
        if not self.bundles.is_dir():
            return []
        held = [entry.name for entry in self.bundles.iterdir() if is_digest(entry.name) and entry.is_dir()]
        return sorted(held, key=lambda digest: (self._used(digest), digest))

    def size(self) -> int:
        """Bytes of all bundles that are here."""
        return sum(tree_bytes(self.bundles / digest) for digest in self.digests())

    def make_room(self, needed: int) -> None:
        """Delete the least recently used bundles that nobody uses until ``needed`` more bytes fit under the cap."""
        if needed > self.max_bytes:
            raise BundleError(
                f"the bundle has {human_bytes(needed)}, the cache holds at most "
                f"{human_bytes(self.max_bytes)}; raise {SIZE_VARIABLE}"
            )
        for digest in self.digests():
            if self.size() + needed <= self.max_bytes:
                return
            self._evict(digest)
        if self.size() + needed > self.max_bytes:
            log.warning("cache %s goes over %s: its bundles are in use", self.root, human_bytes(self.max_bytes))

    def clean(self) -> None:
        """Delete transfers that nobody has added to for ``stale_seconds``, and leftovers of evictions."""
        before = time.time() - self.stale_seconds
        for folder in (self.incoming, self.trash):
            for entry in folder.iterdir() if folder.is_dir() else ():
                try:
                    stale = entry.stat().st_mtime < before
                except FileNotFoundError:
                    continue
                if stale:
                    discard(entry)

    def _folder(self, digest: str) -> Path:
        # The digest comes over the network and becomes a path.
        if not is_digest(digest):
            raise BundleError(f"{show(digest)} isn't a bundle digest: 64 lower-case hex digits")
        return self.bundles / digest

    def _make_folders(self) -> None:
        for folder in (self.bundles, self.incoming, self.trash):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                # Where it is stays here: a site's error goes to the server.
                log.error("the cache %s can't be used: %s", self.root, error)
                raise BundleError(
                    f"the cache can't be used: {error.strerror}; set {CACHE_VARIABLE} to a folder that can be written"
                ) from error

    def _lock_path(self, digest: str) -> Path:
        return self.bundles / f"{digest}.lock"

    def lease(self, digest: str) -> Lease:
        """A shared lock: the bundle of this digest isn't evicted while it is held."""
        lease = Lease.take(self._lock_path(digest))
        assert lease is not None  # it waits
        return lease

    def _used(self, digest: str) -> float:
        try:
            return self._lock_path(digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _evict(self, digest: str) -> bool:
        """Delete a bundle; False if it is in use. What a reader has mapped stays readable to it."""
        lease = Lease.take(self._lock_path(digest), exclusive=True, wait=False)
        if lease is None:
            return False
        with lease:
            self._make_folders()
            aside = self.trash / f"{digest}-{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(FileNotFoundError):
                (self.bundles / digest).rename(aside)
            _verified.pop(self.bundles / digest, None)
            lease.path.unlink(missing_ok=True)
        discard(aside)
        return True


def _open(folder: Path, digest: str, limits: Limits, lease: Lease) -> Bundle:
    state = _state(folder)
    known = _verified.get(folder) == state
    bundle = open_bundle(folder, limits=limits, digest=digest, verify=not known, lease=lease)
    _verified[folder] = state
    return bundle


def _state(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Name, size, time and inode of every file: what changes when someone writes to one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    infos = [(path.relative_to(folder).as_posix(), path.lstat()) for path in files]
    return tuple((name, info.st_size, info.st_mtime_ns, info.st_ino) for name, info in infos)
