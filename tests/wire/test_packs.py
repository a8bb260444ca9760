"""Files of a bundle in messages."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord

from offsite_fl.errors import WireError
from offsite_fl.wire.packs import make_pack, plan_packs, read_pack


def test_packs_are_bounded_and_keep_order() -> None:
    files = [("manifest", 3), ("big", 100), ("x", 4), ("y", 4), ("z", 1)]
    assert plan_packs(files, pack_bytes=8) == [["manifest"], ["big"], ["x", "y"], ["z"]]
    assert plan_packs([], 8) == []


def test_files_come_back() -> None:
    contents = {"manifest.json": b"{}", "shards/a": bytes(range(256)), "empty": b""}
    pack = make_pack(contents.__getitem__, list(contents), "d" * 64)
    pack["config"].count_bytes()
    digest, files = read_pack(pack)
    assert digest == "d" * 64 and dict(files) == contents


def test_forged_packs_are_refused() -> None:
    read = {"a": b"12"}.__getitem__
    pack = make_pack(read, ["a"], "d")
    pack["config"]["bundle.files"] = ["a", "b"]
    with pytest.raises(WireError, match="lists 2 files"):
        read_pack(pack)
    pack = make_pack(read, ["a"], "d")
    pack["arrays"]["a"] = Array(np.zeros((2, 2), np.uint8))
    with pytest.raises(WireError, match="shape"):
        list(read_pack(pack)[1])
    pack = make_pack(read, ["a"], "d")
    pack["config"] = ConfigRecord({"bundle.files": ["a"]})
    with pytest.raises(WireError, match=r"bundle\.digest must be text"):
        read_pack(pack)
