"""A site's patches on disk: the latest two, hashed on every use, apart from other sites'."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite_fl.config import LoraOptions
from offsite_fl.errors import StateError, WireError
from offsite_fl.local import patch_store
from offsite_fl.local.patch_store import MAX_AGE_SECONDS, PatchStore
from offsite_fl.patch import Patch

BUNDLE = "d" * 64
PUBLIC = np.array([7, 2**63], dtype=np.uint64)


def patch(value: float, bundle: str = BUNDLE) -> Patch:
    return Patch({"emulator.0.q.lora_A.weight": torch.tensor([[value]])}, bundle, LoraOptions(1))


def store(root: Path, site: str = "a") -> PatchStore:
    return PatchStore(root, BUNDLE, site)


def test_kept_and_found(tmp_path: Path) -> None:
    assert store(tmp_path).keep(patch(1.0), PUBLIC) == patch(1.0).digest
    found = store(tmp_path).find(patch(1.0).digest)
    assert found is not None and found[0].digest == patch(1.0).digest and found[1].tolist() == PUBLIC.tolist()
    assert store(tmp_path).find(patch(2.0).digest) is None
    assert store(tmp_path, "b").find(patch(1.0).digest) is None


def test_the_two_that_were_used_last_stay(tmp_path: Path) -> None:
    held = store(tmp_path)
    for value in (1.0, 2.0):
        held.keep(patch(value), PUBLIC)
    held.find(patch(1.0).digest)
    held.keep(patch(3.0), PUBLIC)
    assert held.digests() == [patch(1.0).digest, patch(3.0).digest]
    assert len(list(held.folder.iterdir())) == 4  # two files each, nothing half written


@pytest.mark.parametrize("place", [-1, 200, 0])
def test_a_changed_file_is_no_patch_and_goes(place: int, tmp_path: Path) -> None:
    held = store(tmp_path)
    held.keep(patch(1.0), PUBLIC)
    path = held.folder / f"{patch(1.0).digest}.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    assert held.find(patch(1.0).digest) is None and not path.exists()
    assert held.keep(patch(1.0), PUBLIC) == patch(1.0).digest


def test_without_the_fingerprints_it_is_no_patch(tmp_path: Path) -> None:
    held = store(tmp_path)
    held.keep(patch(1.0), PUBLIC)
    (held.folder / f"{patch(1.0).digest}.public").unlink()
    assert held.find(patch(1.0).digest) is None and not held.digests()


def test_patches_of_a_bundle_that_nobody_uses_go(tmp_path: Path) -> None:
    old = PatchStore(tmp_path, "e" * 64, "a")
    old.keep(patch(1.0, "e" * 64), PUBLIC)
    past = time.time() - MAX_AGE_SECONDS - 60
    os.utime(old.folder.parent, (past, past))
    store(tmp_path).keep(patch(1.0), PUBLIC)
    assert not old.folder.exists() and store(tmp_path).digests()


def test_a_full_disk_is_told_without_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(patch_store, "write_synced", full)
    with pytest.raises(StateError, match="can't be kept: No space left on device") as told:
        store(tmp_path).keep(patch(1.0), PUBLIC)
    assert str(tmp_path) not in str(told.value)


def test_digests_from_the_network_are_no_paths(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="64 hex digits"):
        PatchStore(tmp_path, "../../etc", "a")
    with pytest.raises(WireError, match="64 hex digits"):
        store(tmp_path).find("../x")
