"""``bundle --split``: the spread split is found on the calibration text, told, and used."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite_fl.bundle import OwnerMap
from offsite_fl.cli.spread import SpreadSplit
from offsite_fl.emulators.placement import spread_split
from offsite_fl.errors import SplitError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.cli.conftest import World, error_of, run_cli, run_json

SMALL = ("--block-size", 16, "--calibration-tokens", 512)


def expected(world: World, keep: int, adapter: int, pooling: str = "mean-weighted") -> Split:
    """The split by the library, from an owner with another one."""
    owner = ModelOwner.from_pretrained(world.model, Split(first=1, last=0))
    context = owner.context(world.text, 512, 16, 0)
    return spread_split(context, keep, adapter, pooling)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["mean-weighted", "last"])
def test_crash_with_the_split_that_was_found(world: World, tmp_path: Path, pooling: str) -> None:
    out = tmp_path / "bundle"
    spec = f"crash:keep=2,pooling={pooling},placement=spread"
    arguments = ("bundle", world.model, "--emulator", spec, "--out", out, "--calibration", world.text, *SMALL)
    said = run_cli(*arguments, "--split", "spread=5/3")
    split = expected(world, 5, 3, pooling)
    assert f"split spread=5/3 is {split} on" in said.stderr
    assert f"(split {split})" in said.stdout
    note = OwnerMap.load(out)
    assert note.split == str(split) and note.adapter == split.at
    again = run_json(*arguments, "--split", f" {split}", "--force")
    assert again["owner"]["split"] == str(split)
    assert again["digest"] == run_json("inspect", out)["digest"]


def test_any_emulator_can_have_the_spread_split(world: World, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    given = ("--split", "spread=6/2", "--calibration", world.text, *SMALL)
    told = run_json("bundle", world.model, "--emulator", "layer-drop:keep=2", "--out", out, *given)
    assert told["owner"]["adapter"] == [0, 5]


def test_first_last_as_a_split(world: World, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    told = run_json("bundle", world.model, "--emulator", "layer-drop:keep=2", "--out", out, "--split", "2-1")
    assert told["owner"]["adapter"] == [0, 1, 5] and told["owner"]["split"] == "2-1"


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("spread=5/1", "an adapter of 1 can't be spread over 5 kept blocks"),
        ("spread=3/3", "an adapter of 3 can't be spread over 3 kept blocks"),
        ("spread=7/3", "7 blocks can't be kept: the model has 6"),
        ("spread=5", "split 'spread=5' can't be read; write spread=KEEP/ADAPTER, for example spread=12/4"),
        ("spread", "write spread=KEEP/ADAPTER"),
        ("5/3", "split '5/3' can't be read"),
    ],
)
def test_splits_that_cannot_be(world: World, tmp_path: Path, split: str, message: str) -> None:
    arguments = ("--emulator", "layer-drop:keep=2", "--out", tmp_path / "out", "--calibration", world.text, *SMALL)
    assert message in error_of("bundle", world.model, *arguments, "--split", split)
    assert not list(tmp_path.iterdir())


def test_without_calibration_text(world: World, tmp_path: Path) -> None:
    """Told at once, before the model is opened."""
    arguments = ("--emulator", "layer-drop:keep=2", "--out", tmp_path / "out", "--split", "spread=5/3")
    said = error_of("bundle", world.home / "no-model", *arguments)
    assert "--split spread=5/3 is found by comparing blocks on public text: give it by --calibration" in said


@pytest.mark.parametrize("other", [("--first", 1), ("--last", 1), ("--at", "0,5")])
def test_one_way_of_splitting_at_a_time(other: tuple[object, ...]) -> None:
    said = run_cli("bundle", "m", "--emulator", "e", "--out", "o", "--split", "2-2", *other, code=2).output
    assert "--split" in said and str(other[0]) in said


def test_spread_text() -> None:
    assert SpreadSplit.parse(" spread = 12/4 ") == SpreadSplit(keep=12, adapter=4)
    assert str(SpreadSplit(12, 4)) == "spread=12/4"
    assert SpreadSplit.parse("at=0,5") is None
    with pytest.raises(SplitError, match="spread=KEEP/ADAPTER"):
        SpreadSplit.parse("spread=12-4")
