"""The owner's private map: beside the bundle, never in it, and checked when read."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite_fl.bundle import Bundle, OwnerMap, fingerprint, open_bundle
from offsite_fl.errors import BundleError

from .conftest import state_of


@pytest.fixture
def owner_map(bundle: Bundle) -> OwnerMap:
    return OwnerMap(
        digest=bundle.digest,
        blocks_path="model.layers",
        adapter=(0, 1, 11, 12),
        slots={"adapter.2.input_layernorm.weight": "model.layers.11.input_layernorm.weight"},
        split="2-2",
        emulator="layer-drop:keep=2",
        fingerprint="0" * 64,
        report={"bytes": 12, "hidden_error": 0.25},
    )


def test_round_trip_beside_the_bundle(bundle: Bundle, owner_map: OwnerMap) -> None:
    before = state_of(bundle.path)
    path = owner_map.save(bundle.path)
    assert path == bundle.path.parent / "bundle.owner.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert OwnerMap.load(path) == OwnerMap.load(bundle.path) == owner_map
    assert state_of(bundle.path) == before and open_bundle(bundle.path).digest == bundle.digest


def test_a_trailing_slash_changes_nothing(bundle: Bundle, owner_map: OwnerMap) -> None:
    assert owner_map.save(f"{bundle.path}/") == OwnerMap.path_for(bundle.path)


@pytest.mark.parametrize("inside", ["map.json", "shards/map.json", "../bundle/map.json", "../link/map.json"])
def test_never_inside_a_bundle(bundle: Bundle, owner_map: OwnerMap, inside: str) -> None:
    (bundle.path.parent / "link").symlink_to(bundle.path)
    before = state_of(bundle.path)
    with pytest.raises(BundleError, match="inside the bundle"):
        owner_map.save(bundle.path, bundle.path / inside)
    with pytest.raises(BundleError, match="inside the bundle"):
        owner_map.save(bundle.path.parent / "another", bundle.path / inside)
    assert state_of(bundle.path) == before


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="only the model owner has it"):
        OwnerMap.load(tmp_path)
    (tmp_path / "x.owner.json").write_text("{")
    with pytest.raises(BundleError, match="can't be read"):
        OwnerMap.load(tmp_path / "x.owner.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "abc"}, "digest = 'abc'"),
        ({"adapter": [0, -1]}, "adapter"),
        ({"adapter": "01"}, "adapter"),
        ({"slots": {"a": 1}}, "slots"),
        ({"report": []}, "report"),
        ({"split": 3}, "split"),
        ({"format_version": 2}, "format 2"),
        ({"extra": 1}, "with the keys"),
    ],
)
def test_wrong_content(bundle: Bundle, owner_map: OwnerMap, change: dict[str, Any], message: str) -> None:
    path = owner_map.save(bundle.path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        OwnerMap.load(path)


def test_it_knows_its_bundle_and_its_model(bundle: Bundle, owner_map: OwnerMap) -> None:
    adapted = "model.layers.11.w"
    model = {"b": torch.zeros(2, 3), "a": torch.zeros(1, dtype=torch.int8), adapted: torch.zeros(4)}
    paths = tuple(f"model.layers.{index}." for index in owner_map.adapter)
    fitting = OwnerMap(**{**vars(owner_map), "fingerprint": fingerprint(model, paths)})
    fitting.check(digest=bundle.digest, model=model)
    fitting.check(model=dict(reversed(model.items())))
    fitting.check(model={**model, adapted: torch.ones(4)})  # an adapted model is still that model
    with pytest.raises(BundleError, match="not for"):
        fitting.check(digest="1" * 64)
    for other in (
        {**model, "b": torch.zeros(3, 2)},
        {**model, "b": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {**model, "b": torch.full((2, 3), 1e-6)},  # another fine-tune of the same architecture
        {name: model[name] for name in ("b", adapted)},
        {"b": model["b"], "c": model["a"], adapted: model[adapted]},
    ):
        with pytest.raises(BundleError, match="another full model"):
            fitting.check(model=other)
