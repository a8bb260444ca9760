"""Equal examples are found, others aren't."""

from __future__ import annotations

import hashlib
import struct

from datasets import Dataset

from offsite_fl.data.fingerprints import fingerprints, overlap


def examples(*rows: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": list(rows), "labels": list(rows)})


def test_by_hand() -> None:
    expected = struct.unpack("<Q", hashlib.sha256(struct.pack("<3q", 5, 6, 7)).digest()[:8])[0]
    assert fingerprints(examples([5, 6, 7])).tolist() == [expected]


def test_overlap_counts_equal_examples_once() -> None:
    public = fingerprints(examples([1, 2], [3, 4], [5, 6]))
    assert overlap(examples([7, 8], [3, 4], [3, 4]), public) == 1
    assert overlap(examples([2, 1], [3, 4, 5], [3]), public) == 0


def test_copies_and_order_do_not_show() -> None:
    assert fingerprints(examples([1, 2], [3, 4], [1, 2])).tolist() == fingerprints(examples([3, 4], [1, 2])).tolist()
