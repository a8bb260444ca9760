"""``offsite-fl choose`` by commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import World, error_of, run_cli, run_json

FAST = ("--block-size", 16, "--batch-size", 4, "--steps", 2, "--first", 1, "--last", 1, "--held-out-tokens", 64)
TWO = ("--candidate", "layer-drop:{keep}", "--candidate", "quantize:bits=8,group=16")


def test_json_and_files(world: World, tmp_path: Path) -> None:
    out = tmp_path / "choice"
    told = run_json("choose", world.model, "--calibration", world.text, "--data", world.text, "--out", out, *FAST, *TWO)
    assert {entry["spec"] for entry in told["candidates"]} == {"layer-drop:keep=0.5", "quantize:bits=8,group=16"}
    assert told["budget"] == "50%"
    kept = json.loads((out / "choose.json").read_text())
    assert kept["candidates"] == told["candidates"]
    for name in ("choose.html", "choose.csv", "choose.md", "cells.jsonl"):
        assert (out / name).stat().st_size > 0


def test_what_is_printed(world: World, tmp_path: Path) -> None:
    sources = ("--calibration", world.text, "--data", world.text)
    given = ("choose", world.model, *sources, "--out", tmp_path / "choice", *FAST, *TWO)
    said = run_cli(*given, "--candidate", "first:keep=9").stdout
    assert "layer-drop" in said and "can't keep 9 of 4" in said and "choose.html" in said.replace("\n", "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "lots"), "budget 'lots' can't be read"),
        (("--full-fine-tuning",), "full fine-tuning needs data"),
        (("--set", "batch-size=0"), "batch-size"),
        (("--steps", 3), "--steps is about tuning, and without --data nothing is tuned"),
        (("--scale", 0.5), "--scale is about tuning"),
        (("--full-lr", 1e-4), "--full-lr is for --full-fine-tuning"),
        (
            ("--candidate", "first:{keep}", "--candidate", "frist:{keep}"),
            "candidate 'frist:keep=0.5': unknown emulator",
        ),
    ],
)
def test_what_is_wrong_is_told(world: World, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    given = ("choose", world.model, "--calibration", world.text, "--out", tmp_path / "choice")
    assert message in error_of(*given, "--block-size", 16, *more)


def test_somebody_else_s_files_are_kept(world: World, tmp_path: Path) -> None:
    other = tmp_path / "choice" / "choose.json"
    other.parent.mkdir()
    other.write_text("mine")
    said = error_of("choose", world.model, "--calibration", world.text, "--out", other.parent, "--block-size", 16)
    assert "has choose.json but no cells.jsonl" in said and other.read_text() == "mine"


@pytest.mark.parametrize(
    "more",
    [
        ("--seeds", "0"),
        ("--seeds", "many"),
        ("--seeds", "1,-2"),
        ("--split", "1-1", "--first", "1"),
        ("--set", "max-steps"),
    ],
)
def test_usage_errors(world: World, tmp_path: Path, more: tuple[str, ...]) -> None:
    given = ("choose", world.model, "--calibration", world.text, "--out", tmp_path / "choice")
    assert not run_cli(*given, *more, code=2).stdout


@pytest.mark.parametrize(("text", "seeds"), [("2", [0, 1]), ("7,3", [7, 3]), ("5,", [5])])
def test_seeds_splits_and_settings(world: World, tmp_path: Path, text: str, seeds: list[int]) -> None:
    """Without an option the tuning of the page is the default's, and ``--set`` reaches what has no option."""
    told = run_json(
        *("choose", world.model, "--calibration", world.text, "--data", world.text, "--out", tmp_path / "choice"),
        *("--block-size", 16, "--set", "max-steps=1", "--set", "weight-decay=0.1", "--split", "at=0,5"),
        *("--seeds", text, "--budget", "3KB", "--candidate", "prune:{keep},mode=structured"),
    )
    settings = told["settings"]
    assert settings["seeds"] == seeds and settings["split"] == "at=0,5" and settings["model"] == "model"
    assert settings["tune.max-steps"] == 1 and settings["tune.weight-decay"] == 0.1
    assert settings["tune.batch-size"] == 8 and settings["rates"] == [5e-4] and settings["tune.schedule"] == "cosine"
    assert told["candidates"][0]["spec"].startswith("prune:bytes=3000") and told["budget_bytes"] == 3000


def test_an_adapter_spread_over_the_blocks(world: World, tmp_path: Path) -> None:
    told = run_json(
        *("choose", world.model, "--calibration", world.text, "--out", tmp_path / "choice", "--block-size", 16),
        *("--split", "spread=4/2", "--candidate", "quantize:bits=8,group=16"),
    )
    assert told["settings"]["split"].startswith("at=") and told["candidates"][0]["verdict"] != "failed"
