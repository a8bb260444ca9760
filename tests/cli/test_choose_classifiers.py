"""``offsite-fl choose`` on classifier folders, by commands alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import error_of, run_json
from tests.cli.test_classification import files

FAST = ("--block-size", 16, "--batch-size", 6, "--steps", 2, "--split", "1-1", "--candidate", "first:keep=1")


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_classifier_by_commands(kind: str, tmp_path: Path) -> None:
    model, public, private, test = files(kind, tmp_path)
    told = run_json(
        *("choose", model, "--calibration", public, "--data", private, "--test", test, "--out", tmp_path / "choice"),
        *(*FAST, "--calibration-examples", 9, "--held-out-examples", 3, "--test-examples", 6, "--repair"),
        *(("--set", "augment=flip") if kind == "vit" else ()),
    )
    settings, (candidate,) = told["settings"], told["candidates"]
    assert settings["calibration-examples"] == 9 and settings["test-examples"] == 6 and settings["repair"] is True
    accuracy = candidate["accuracy"]
    assert candidate["verdict"] != "failed" and 0 <= accuracy["without_repair"]["mean"] <= 1
    assert accuracy["plug_in"]["mean"] * 6 == pytest.approx(round(accuracy["plug_in"]["mean"] * 6), abs=1e-5)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model, public, private, _ = files("bert", tmp_path)
    given = ("choose", model, "--calibration", public, "--data", private, "--out", tmp_path / "choice", *FAST)
    assert "give test-examples" in error_of(*given, "--test-tokens", 64)
    assert "head-from is calibration or model, got 'clouds'" in error_of(*given, "--head-from", "clouds")
