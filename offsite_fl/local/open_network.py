"""The network that a process has open, from one message to the next."""

from __future__ import annotations

import threading

from offsite_fl.bundle import Cache
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.local.answering import BundleMissing


class OpenNetwork:
    """The network that this process has open: one, for frozen weights are large, shared by all virtual clients."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._open: dict[tuple[str, str, str | None], DataOwner] = {}

    def open(self, cache: Cache, digest: str, tune: TuneConfig) -> DataOwner:
        """The data owner of a bundle in ``cache``; ``BundleMissing`` if it isn't there.

        A digest is the same bundle in every cache, so virtual clients with caches of their own share it too.
        """
        key = (digest, tune.frozen_dtype, tune.device)
        if key not in self._open:
            bundle = cache.find(digest)
            if bundle is None:
                raise BundleMissing(f"bundle {digest[:12]} isn't in this site's cache")
            self._open.clear()
            self._open[key] = DataOwner.open(bundle, tune.frozen_dtype, tune.device)
        return self._open[key]

    def clear(self) -> None:
        """Forget it, as a new process would."""
        self._open.clear()


networks = OpenNetwork()
