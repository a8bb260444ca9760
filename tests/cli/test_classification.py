"""The commands on an image classifier and a text classifier folder, one after the other as people run them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite_fl.models.load import load_model
from tests.conftest import make_tokenizer
from tests.pico_classifiers import image_folder, labelled_rows, make_classifier, make_image_processor

from .conftest import error_of, run_cli, run_json

TUNING = ("--batch-size", 6, "--max-steps", 20, "--lr", 2e-3, "--set", "head-lr-scale=5", "--block-size", 16)


def files(kind: str, home: Path) -> tuple[Path, Path, Path, Path]:
    """The model's folder, and public, private and test data."""
    model: Any = make_classifier(kind)
    model.save_pretrained(home / "model")
    processor: Any = make_image_processor() if kind == "vit" else make_tokenizer()
    processor.save_pretrained(home / "model")
    found = [home / "model"]
    for seed, name in enumerate(("public", "private", "test")):
        if kind == "vit":
            found.append(image_folder(home / name, 4, seed=seed))
        else:
            found.append(home / f"{name}.jsonl")
            found[-1].write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(4, seed)))
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_bundle_inspect_tune_plug_evaluate(kind: str, tmp_path: Path) -> None:
    model, public, private, test = files(kind, tmp_path)
    bundle, update, out = tmp_path / "bundle", tmp_path / "update.safetensors", tmp_path / "adapted"
    public_text = ("--calibration", public, "--class-means", public, "--block-size", 16)
    emulator = ("--emulator", "layer-drop:keep=2+low-rank:keep=0.5")
    run_json("bundle", model, *emulator, "--out", bundle, "--split", "1-1", *public_text)
    seen = run_json("inspect", bundle)
    assert seen["head"] == ["classifier.weight", "classifier.bias"] and seen["format_version"] == 2
    assert seen["processor"] == ("image processor" if kind == "vit" else "tokenizer")
    assert "trained head: classifier.weight, classifier.bias" in run_cli("inspect", bundle).stdout
    tuned = run_json(
        "tune",
        bundle,
        "--data",
        private,
        "--out",
        update,
        *TUNING,
        *(("--set", "augment=flip") if kind == "vit" else ()),
    )
    assert tuned["num_examples"] == 12
    report = tmp_path / "report"
    measured = run_json(
        "evaluate", model, "--bundle", bundle, "--data", test, "--update", update, "--block-size", 16, "--out", report
    )
    rows = measured["rows"]
    assert all(0 <= rows[key][name] <= 1 for key in ("full_zero_shot", "plug_in") for name in ("accuracy", "f1"))
    assert rows["plug_in"]["accuracy"] > 0.6
    table = list(csv.DictReader((report / "report.csv").open()))
    assert float(table[0]["f1"]) == pytest.approx(rows["full_zero_shot"]["f1"])
    page = (report / "report.html").read_text()
    assert "macro F1" in page and '"examples": 12' in (report / "report.json").read_text().replace("\n", " ")
    run_json("plug", model, update, "--bundle", bundle, "--out", out)
    adapted: Any = load_model(out, None)[0]
    # The head that was tuned from the class means is in the folder.
    assert not torch.equal(adapted.classifier.weight, make_classifier(kind).classifier.weight)


def test_what_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    model, public, _, _ = files("vit", tmp_path)
    basic = ("bundle", model, "--emulator", "layer-drop:keep=2", "--split", "1-1", "--out", tmp_path / "bundle")
    assert "no parameter outside the blocks" in error_of(*basic, "--head", "clasifier")
    (public / "fox").mkdir()
    (public / "fox" / "a.png").write_bytes((public / "cat" / "0.png").read_bytes())
    assert "'fox' is none of the model's 3 classes" in error_of(*basic, "--class-means", public)
    run_cli(*basic, "--head", "none")
    assert run_json("inspect", tmp_path / "bundle")["head"] == []
