"""The commands on an image classifier and a text classifier folder, one after the other as people run them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite_fl.models.load import load_model
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer
from tests.pico_classifiers import NAMES, image_folder, labelled_rows, make_classifier, make_image_processor

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


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_rows_are_of_the_test_files_examples_and_the_report_says_so(kind: str, tmp_path: Path) -> None:
    """Fault 25: numbers of a part of the training data. Counted and worked out here from the test files alone."""
    model, _, private, test = files(kind, tmp_path)
    bundle, report = tmp_path / "bundle", tmp_path / "report"
    if kind == "vit":
        (test / "cat" / "0.png").unlink()
    else:  # the few words of these texts come again in the other file
        rows = [{"text": f"{word} {number}", "label": word} for number in range(4) for word in NAMES]
        test.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    run_json("bundle", model, "--emulator", "layer-drop:keep=2", "--out", bundle, "--split", "1-1")
    given = ("evaluate", model, "--bundle", bundle, "--block-size", 16, "--steps", 1, "--fine-tune", private)
    rows = run_json(*given, "--data", test, "--out", report)["rows"]
    told = json.loads((report / "report.json").read_text())
    assert told["data"] == {"held-out test": {"examples": 11}}
    assert (told["config"]["data"], told["config"]["fine-tune"]) == (str(test), [str(private)])
    assert not any("are also among" in note for note in told["notes"])
    opened: Any = load_model(model, None)
    owner = ModelOwner(*opened, Split(first=1, last=1))
    right = 0
    for row in owner.examples(test, 16):
        inputs = {name: torch.as_tensor(row[name])[None] for name in ("pixel_values", "input_ids") if name in row}
        with torch.no_grad():
            right += int(owner.model(**inputs).logits.argmax()) == int(row["labels"])
    assert rows["full_zero_shot"]["accuracy"] == pytest.approx(right / 11)
    # What is tuned on is measured: the report says it.
    run_json(*given, "--data", private, "--out", report)
    notes = json.loads((report / "report.json").read_text())["notes"]
    assert any(re.search(r"([0-9]+) of \1 different test examples are also among those that", note) for note in notes)


def test_what_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    model, public, _, _ = files("vit", tmp_path)
    basic = ("bundle", model, "--emulator", "layer-drop:keep=2", "--split", "1-1", "--out", tmp_path / "bundle")
    assert "no parameter outside the blocks" in error_of(*basic, "--head", "clasifier")
    (public / "fox").mkdir()
    (public / "fox" / "a.png").write_bytes((public / "cat" / "0.png").read_bytes())
    assert "'fox' is none of the model's 3 classes" in error_of(*basic, "--class-means", public)
    run_cli(*basic, "--head", "none")
    assert run_json("inspect", tmp_path / "bundle")["head"] == []
