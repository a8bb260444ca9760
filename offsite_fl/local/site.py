"""Who answers a message, and where it keeps what: as the site's operator set it, never as a message asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from flwr.app import Context

from offsite_fl.bundle import Cache
from offsite_fl.config import cache_root
from offsite_fl.wire.records import text

NameSite: TypeAlias = Callable[[Context], str | None]


def client_name(context: Context) -> str:
    """What this site is called in logs and reports: ``name`` in the node config, else by partition or node."""
    config = context.node_config
    if "name" in config:
        return text(config["name"], "name")
    return f"client-{config['partition-id']}" if "partition-id" in config else f"node-{context.node_id}"


@dataclass(frozen=True)
class Site:
    """One site, as its Flower context tells and as ``make_client_app`` was given ``name`` and ``cache``."""

    context: Context
    given_name: NameSite = client_name
    given_cache: Cache | str | Path | None = None

    @property
    def name(self) -> str:
        """What this site is called."""
        return self.given_name(self.context) or client_name(self.context)

    @property
    def lasting_name(self) -> str:
        """The name, or "" where it is made of the node's number, which the server gives anew to whom it likes."""
        return "" if self.name == f"node-{self.context.node_id}" else self.name

    @property
    def cache(self) -> Cache:
        """Where this site keeps bundles."""
        if isinstance(self.given_cache, Cache):
            return self.given_cache
        folder = self.given_cache or self.context.node_config.get("cache-dir")
        size = self.context.node_config.get("cache-bytes")
        return Cache(
            str(folder) if folder else None, size if isinstance(size, (int, str)) and size is not True else None
        )

    @property
    def kept(self) -> Path:
        """Where it keeps what it is asked to remember: patches, state between rounds, the question it answered.

        A simulation of one's own takes a folder for each run.
        """
        folder = self.context.node_config.get("state-dir")
        return cache_root(str(folder)) if folder else self.cache.root

    @property
    def folders(self) -> list[str]:
        """Paths of this site that errors may name."""
        cache = self.given_cache or self.context.node_config.get("cache-dir")
        root = cache.root if isinstance(cache, Cache) else cache_root(str(cache) if cache else None)
        keys = ("cache-dir", "state-dir", "data", "validation-data")
        told = [str(self.context.node_config.get(key, "")) for key in keys]
        paths = [root, *(Path(each) for each in told if each)]
        return [str(form) for path in paths for form in (path.absolute(), path.resolve()) if len(form.parts) > 1]
