"""The files of a bundle in messages: a few small ones together, a large one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from offsite_fl.errors import WireError
from offsite_fl.wire import names
from offsite_fl.wire.records import numpy_array, only_arrays, only_config, text, texts

# Small files share a message, because a message costs a process start at a real site. A shard is larger than this.
PACK_BYTES = 64 * 2**20


def plan_packs(files: Iterable[tuple[str, int]], pack_bytes: int = PACK_BYTES) -> list[list[str]]:
    """Group ``(name, bytes)`` in order so that no group of several files is larger than ``pack_bytes``.

    >>> plan_packs([("a", 3), ("b", 4), ("c", 9), ("d", 1)], pack_bytes=8)
    [['a', 'b'], ['c'], ['d']]
    """
    packs: list[list[str]] = []
    filled = 0
    for name, size in files:
        if not packs or filled + size > pack_bytes:
            packs.append([])
            filled = 0
        packs[-1].append(name)
        filled += size
    return packs


def make_pack(read: Callable[[str], bytes], pack: Sequence[str], digest: str) -> RecordDict:
    """One message's content: files of a bundle, which ``read`` gives by name, as uint8 arrays under their names.

    Weights never go into a config record: Flower doesn't chunk its bytes.
    """
    arrays = {name: Array(np.frombuffer(read(name), dtype=np.uint8)) for name in pack}
    config = ConfigRecord({names.DIGEST: digest, names.FILES: list(pack)})
    return RecordDict({names.ARRAYS: ArrayRecord(arrays), names.CONFIG: config})


def read_pack(content: RecordDict) -> tuple[str, Iterator[tuple[str, bytes]]]:
    """Digest of the bundle and its ``(file name, bytes)``, one at a time. Checking them is the cache's task."""
    arrays, config = only_arrays(content)[1], only_config(content)[1]
    listed = texts(config.get(names.FILES), names.FILES)
    if sorted(listed) != sorted(arrays):
        raise WireError(f"{names.FILES} lists {len(listed)} files, the message holds {len(arrays)} others")

    def files() -> Iterator[tuple[str, bytes]]:
        for name in listed:
            array = arrays.pop(name)  # gone from the message as soon as it is stored
            size = array.shape[0] if len(array.shape) == 1 else -1
            yield name, numpy_array(array, name, "uint8", (size,)).tobytes()

    return text(config.get(names.DIGEST), names.DIGEST), files()
