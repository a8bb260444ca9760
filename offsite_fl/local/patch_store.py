"""The patch of the emulator that a site holds, on its own disk: whole or not at all, and hashed on every use.

Layout in the cache folder::

    patches/<bundle's digest>/<hash of the site's name>/<digest>.safetensors   the factors
    patches/<bundle's digest>/<hash of the site's name>/<digest>.public        fingerprints of public examples, uint64

The two patches that were used last are kept: a server that lost a round and resumes goes back by one. Patches of
bundles that nobody patched for 30 days are deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from offsite_fl.bundle.files import discard, read_plain, write_synced
from offsite_fl.bundle.manifest import is_digest
from offsite_fl.data.fingerprints import Fingerprints
from offsite_fl.errors import OffsiteError, StateError, UpdateError, WireError
from offsite_fl.patch import Patch

log = logging.getLogger("offsite_fl.patches")

FOLDER = "patches"
KEPT = 2
MAX_BYTES = 2**33
MAX_AGE_SECONDS = 30 * 24 * 3600.0


class PatchStore:
    """What the site called ``site`` keeps of the patches of one bundle; ``root`` is the cache's folder."""

    def __init__(self, root: Path, bundle: str, site: str) -> None:
        if not is_digest(bundle):  # it comes over the network and becomes a path
            raise WireError(f"a patch is for a bundle, whose digest is 64 hex digits; got {ascii(bundle)[:60]}")
        self.folder = root / FOLDER / bundle / hashlib.sha256(site.encode()).hexdigest()[:16]
        self.bundle = bundle

    def keep(self, patch: Patch, public: Fingerprints) -> str:
        """Write a patch and return the digest of what is then on the disk; drop all but the latest two."""
        path = self._path(patch.digest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_synced(self._public(patch.digest), public.astype("<u8").tobytes(), 0o600)
            write_synced(path, patch.to_bytes(), 0o600)
            self._touch(path)
            held = self._read(path).digest
            self._clean()
        except OSError as error:
            log.error("the patch can't be kept in %s: %s", self.folder, error)
            raise StateError(f"the patch can't be kept: {error.strerror}; where is in the site's own log") from error
        for old in self.digests()[:-KEPT]:
            self._path(old).unlink(missing_ok=True)
            self._public(old).unlink(missing_ok=True)
        return held

    def find(self, digest: str) -> tuple[Patch, Fingerprints] | None:
        """The patch of this digest, or None where it isn't here or isn't what was written; that one is deleted."""
        if not is_digest(digest):
            raise WireError(f"the digest of a patch must be 64 hex digits, got {ascii(digest)[:60]}")
        path = self._path(digest)
        try:
            patch = self._read(path)
            public = np.frombuffer(read_plain(self._public(digest), MAX_BYTES, "patch"), dtype="<u8")
        except (OffsiteError, ValueError, OSError) as error:
            if path.exists():
                self._drop(digest, str(error))
            return None
        if patch.digest != digest or patch.bundle != self.bundle:
            self._drop(digest, f"its digest is {patch.digest[:12]}")
            return None
        self._touch(path)
        return patch, public.astype(np.uint64)

    def digests(self) -> list[str]:
        """Digests of the patches that are here, the least recently used first."""
        held = [path for path in self.folder.glob("*.safetensors") if is_digest(path.stem)]
        return [path.stem for path in sorted(held, key=lambda path: (path.stat().st_mtime_ns, path.stem))]

    def _read(self, path: Path) -> Patch:
        try:
            return Patch.from_bytes(read_plain(path, MAX_BYTES, "patch"))
        except UpdateError as error:
            raise StateError(f"{path.name}: {error}") from error

    def _clean(self) -> None:
        os.utime(self.folder.parent)
        for other in self.folder.parent.parent.iterdir():
            with suppress(FileNotFoundError):  # another process deletes it at the same time
                if other.stat().st_mtime < time.time() - MAX_AGE_SECONDS:
                    discard(other)

    def _drop(self, digest: str, reason: str) -> None:
        log.warning("the patch %s was damaged on the disk and will be fetched again: %s", digest[:12], reason)
        self._path(digest).unlink(missing_ok=True)
        self._public(digest).unlink(missing_ok=True)

    def _touch(self, path: Path) -> None:
        os.utime(path, ns=(time.time_ns(), time.time_ns()))

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"

    def _public(self, digest: str) -> Path:
        return self.folder / f"{digest}.public"
