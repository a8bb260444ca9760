"""Short hashes of examples, by which two parties find out whether they hold the same ones without showing them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.data.contents import contents_of

Fingerprints = npt.NDArray[np.uint64]


def fingerprints(examples: Dataset) -> Fingerprints:
    """The first eight bytes of the SHA-256 over each example's token ids or image, sorted, each once.

    Two different examples share one with a chance of 2**-64. Only equal examples do: the same text that is cut at
    another place, or by another tokenizer, isn't recognised.
    """
    every = {
        int.from_bytes(hashlib.sha256(_bytes(content)).digest()[:8], "little") for content in contents_of(examples)
    }
    return np.array(sorted(every), dtype=np.uint64)


def _bytes(content: tuple[int, ...] | bytes) -> bytes:
    return content if isinstance(content, bytes) else np.asarray(content, dtype="<i8").tobytes()


def overlap(examples: Dataset, known: Fingerprints) -> int:
    """How many of ``known`` belong to an example of ``examples``."""
    return int(np.intersect1d(fingerprints(examples), known).size)


def leak(used: Iterable[Dataset], test: Dataset) -> str | None:
    """A sentence for a report where examples of ``test`` are also among those ``used`` before; else None.

    Only equal examples are noticed (:func:`fingerprints`).
    """
    known = fingerprints(test)
    found = {int(number) for examples in used for number in np.intersect1d(fingerprints(examples), known)}
    said = f"{len(found)} of {len(known)} different test examples are also among those that are tuned on"
    return f"{said}: the rows say less about new ones." if found else None
