"""What the model owner hands over: manifest, safetensors shards, tokenizer; and the data owner's cache of it."""

from offsite_fl.bundle.cache import Cache
from offsite_fl.bundle.incoming import Incoming
from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.manifest import Manifest
from offsite_fl.bundle.owner_map import OwnerMap, fingerprint
from offsite_fl.bundle.read import Bundle, BundleTensors, open_bundle
from offsite_fl.bundle.write import SHARD_BYTES, write_bundle

__all__ = [
    "SHARD_BYTES",
    "Bundle",
    "BundleTensors",
    "Cache",
    "Incoming",
    "Limits",
    "Manifest",
    "OwnerMap",
    "fingerprint",
    "open_bundle",
    "write_bundle",
]
