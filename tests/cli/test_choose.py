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
    given = ("choose", world.model, "--calibration", world.text, "--out", tmp_path / "choice", *FAST, *TWO)
    said = run_cli(*given, "--candidate", "first:keep=9").stdout
    assert "layer-drop" in said and "can't keep 9 of 4" in said and "choose.html" in said.replace("\n", "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "lots"), "budget 'lots' can't be read"),
        (("--full-fine-tuning",), "full fine-tuning needs data"),
        (("--set", "batch-size=0"), "batch-size"),
    ],
)
def test_what_is_wrong_is_told(world: World, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    given = ("choose", world.model, "--calibration", world.text, "--out", tmp_path / "choice")
    assert message in error_of(*given, "--block-size", 16, *more)
