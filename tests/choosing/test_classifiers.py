"""Whole comparisons of pico classifiers: what they are measured by, and that text's options are refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from offsite_fl.choosing import Choice, choose
from offsite_fl.choosing.kinds import CLASSES, TEXT, by_turns, kind_of
from offsite_fl.choosing.parts import digest_of, read_parts
from offsite_fl.choosing.settings import Settings
from offsite_fl.config import TuneConfig
from offsite_fl.data.loader import make_loader
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import parse_emulator, start
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.errors import ConfigError, DataError, ModelError
from offsite_fl.evaluation.classification import evaluate_classes
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer
from tests.pico_classifiers import image_folder, labelled_rows, make_classifier, make_image_processor

SPEC = "layer-drop:keep=2"
FAST = TuneConfig(max_steps=3, lr=1e-2, head_lr_scale=2.0, batch_size=6, block_size=16, progress=False, device="cpu")


def make_owner(kind: str) -> ModelOwner:
    processor = make_image_processor() if kind == "vit" else make_tokenizer()
    return ModelOwner(make_classifier(kind), processor, Split(first=1, last=1))


def sources(kind: str, home: Path) -> tuple[Any, Any, Any]:
    """Public, private and test data: folders of images, or rows of text."""
    if kind == "vit":
        there = (home / "public").is_dir()
        parts = [("public", 8), ("private", 8), ("test", 6)]
        made = [home / n if there else image_folder(home / n, each, seed) for seed, (n, each) in enumerate(parts)]
    else:
        made = [Dataset.from_list(labelled_rows(each, seed)) for seed, each in enumerate((8, 8, 6))]
    return made[0], made[1], made[2]


def compare(owner: ModelOwner, kind: str, home: Path, **changes: Any) -> Choice:
    public, private, test = sources(kind, home)
    given: dict[str, Any] = {"calibration": public, "data": private, "test": test, "candidates": (SPEC,), "tune": FAST}
    return choose(owner, out=home / "choice", budget=0.7, **(given | changes))


def tuned_of(home: Path) -> dict[str, Any]:
    """What stands in the file of the one candidate."""
    lines = [json.loads(line) for line in (home / "choice" / "cells.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["role"] == "candidate"]
    assert found["error"] is None
    return dict(found["tuned"])


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_numbers_are_those_of_the_two_parties(kind: str, tmp_path: Path) -> None:
    """The same by way of a nearest-mean head, a bundle on disk, a data owner who opens it, and the five rows."""
    owner = make_owner(kind)
    before = {name: tensor.clone() for name, tensor in owner.model.state_dict().items()}
    choice = compare(owner, kind, tmp_path, seeds=(3,), repair=True, full_fine_tuning=True, full_rates=(1e-2,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in owner.model.state_dict().items())
    found = tuned_of(tmp_path)
    settings = Settings(tune=FAST, kind=CLASSES)
    parts = read_parts(owner.examples, owner.pad_id, settings, *sources(kind, tmp_path))
    assert parts.private is not None
    owner.set_nearest_mean_head(parts.calibration, block_size=16)
    bundle = owner.make_bundle(SPEC, tmp_path / "bundle", calibration=parts.calibration, block_size=16, seed=3)
    config = replace(FAST, seed=3)
    update = DataOwner.open(bundle, "float32").tune(parts.private.train, config, validation=parts.private.validation)
    repair = owner.measure_repair(parts.calibration, config)
    measure = Measure(owner, parts.private.test, block_size=16, device="cpu")
    rows = {
        "zero_shot": measure.full_zero_shot(),
        "emulator_zero_shot": measure.emulator_zero_shot(),
        "emulator_tuned": measure.emulator_tuned(update.tensors),
        "plug_in": measure.plug_in(update.tensors),
        "without_repair": measure.plug_in(update.tensors, repair=repair),
    }
    for name, row in rows.items():
        assert found["accuracy"][name] == pytest.approx(row.accuracy), name
    with owner.plugged_in(update.tensors) as model:
        assert found["plug_in"] == pytest.approx(evaluate_classes(model, measure.batches).loss, abs=1e-5)
    with owner.plugged_in(update.tensors, repair=repair) as model:
        assert found["without_repair"] == pytest.approx(evaluate_classes(model, measure.batches).loss, abs=1e-5)
    assert found["without_repair"] != pytest.approx(found["plug_in"], abs=1e-4)
    full = measure.full_fine_tuning([parts.private.train], replace(config, lr=1e-2))
    assert choice.accuracy is not None and choice.accuracy.full_fine_tuning is not None
    assert choice.accuracy.full_fine_tuning.mean == pytest.approx(full.accuracy)
    (standing,) = choice.standings
    assert standing.accuracy is not None and standing.accuracy.gap is not None
    expected = found["accuracy"]["plug_in"] - found["accuracy"]["emulator_tuned"]
    assert standing.accuracy.gap.mean == pytest.approx(expected)
    context = owner.context(parts.calibration, 10_000, 16, 3)
    batches = parts.batches(parts.public)
    emulator = parse_emulator(SPEC).compress(start(context), context)
    match = match_gradients(emulator_gradients(emulator, context, batches), full_gradients(context, batches))
    assert standing.cosine is not None and standing.cosine.mean == pytest.approx(match.cosine, abs=1e-5)


def test_the_files_of_a_classifier_have_loss_and_accuracy(tmp_path: Path) -> None:
    choice = compare(make_owner("vit"), "vit", tmp_path, candidates=(SPEC, "quantize:bits=8,group=16"))
    choice.write()
    entry = json.loads((tmp_path / "choice" / "choose.json").read_text())
    rows = list(csv.DictReader((tmp_path / "choice" / "choose.csv").open()))
    for row, standing in zip(rows, choice.standings, strict=True):
        assert standing.accuracy is not None and standing.plug_in is not None
        assert standing.accuracy.plug_in is not None
        assert float(row["accuracy_plug_in"]) == standing.accuracy.plug_in.mean
        assert float(row["plug_in"]) == standing.plug_in.mean
    assert 0 <= entry["references"]["accuracy"]["zero_shot"] <= 1
    assert entry["settings"]["head-from"] == "calibration" and entry["settings"]["calibration-examples"] == 256
    page = (tmp_path / "choice" / "choose.html").read_text()
    assert page.count("<svg") == 2 and "the class whose mean is nearest" in page
    for wrong in ("public text", "per token", "text from"):
        assert wrong not in page
    head = (tmp_path / "choice" / "choose.md").read_text().splitlines()[0]
    assert "| plug-in |" in head and "| plug-in, loss |" in head


def test_the_models_own_head_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    owner = make_owner("bert")
    own = compare(owner, "bert", tmp_path, head_from="model").accuracy
    batches = make_loader(owner.examples(sources("bert", tmp_path)[2], 16), 8, pad_id=owner.pad_id)
    assert own is not None and own.zero_shot == pytest.approx(evaluate_classes(owner.model, batches).accuracy)
    again = compare(owner, "bert", tmp_path).accuracy
    # Letters are told apart by their means; what a random head answers is chance.
    assert own.zero_shot is not None and again is not None and again.zero_shot is not None
    assert own.zero_shot < 0.7 and again.zero_shot > 0.8
    assert len((tmp_path / "choice" / "cells.jsonl").read_text().splitlines()) == 4


def test_without_data_the_gradient_decides(tmp_path: Path) -> None:
    choice = compare(make_owner("vit"), "vit", tmp_path, data=None, test=None, candidates=(SPEC, "first:keep=1"))
    assert not choice.tuned and choice.accuracy is None and choice.write().joinpath("choose.html").is_file()
    assert all(standing.cosine is not None for standing in choice.standings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_tokens": 64}, "test-tokens doesn't fit a model for sequence-classification.* give test-examples"),
        ({"held_out_tokens": 64}, "give held-out-examples"),
        ({"calibration_examples": 0}, "calibration-examples must be at least 1"),
        ({"head_from": "clouds"}, "head-from is calibration or model, got 'clouds'"),
        ({"repair": True, "data": None, "test": None}, "give data too"),
        ({"calibration": Dataset.from_list(labelled_rows(9)[::3])}, "no example of class 'dog'"),
        ({"calibration": Dataset.from_list([{"text": "a b"}] * 9)}, "label"),
    ],
)
def test_what_can_not_be_compared(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        compare(make_owner("bert"), "bert", tmp_path, **changes)
    assert not (tmp_path / "choice" / "cells.jsonl").exists()


def test_a_head_that_is_not_trained_is_not_made(tmp_path: Path) -> None:
    owner = ModelOwner(make_classifier("bert"), make_tokenizer(), Split(first=1, last=1), head="none")
    with pytest.raises(ConfigError, match="give head-from = model"):
        compare(owner, "bert", tmp_path)
    assert compare(owner, "bert", tmp_path, head_from="model").standings[0].verdict != "failed"


def test_a_head_that_can_not_be_made_is_said_with_what_can(tmp_path: Path) -> None:
    owner, lora = make_owner("llama"), replace(FAST, lora_rank=2)  # its last layer has no bias
    with pytest.raises(ModelError, match=r"no bias.*give head-from = model"):
        compare(owner, "llama", tmp_path)
    assert compare(owner, "llama", tmp_path, head_from="model", tune=lora).standings[0].verdict != "failed"


def test_kinds_by_task() -> None:
    assert kind_of("image-classification") is kind_of("sequence-classification") is CLASSES
    assert kind_of("causal-lm") is kind_of("image-text-to-text") is TEXT


def test_every_beginning_has_all_classes_in_proportion() -> None:
    """Six of class 0, then three of 1, then one of 2, as a folder would have them."""
    rows = Dataset.from_dict({"input_ids": [[i] for i in range(10)], "labels": [0] * 6 + [1] * 3 + [2]})
    turned = by_turns(rows)
    assert sorted(ids[0] for ids in turned["input_ids"]) == list(range(10))
    assert set(turned["labels"][:3]) == {0, 1, 2}
    counts = Counter(turned["labels"][:6])
    assert counts == {0: 3, 1: 2, 2: 1}


def test_parts_of_a_folder_are_apart_and_named_by_what_the_model_sees(tmp_path: Path) -> None:
    owner, folder = make_owner("vit"), image_folder(tmp_path / "public", 8)
    settings = Settings(kind=CLASSES, calibration_examples=9, held_out_examples=6)
    parts = read_parts(owner.examples, owner.pad_id, settings, folder)
    assert Counter(parts.calibration.with_format(None)["labels"]) == {0: 3, 1: 3, 2: 3}
    assert Counter(parts.public.with_format(None)["labels"]) == {0: 2, 1: 2, 2: 2}
    first = parts.digests()
    assert first["calibration"] != first["public"] and digest_of(parts.public) == first["public"]
    owner.processor.size = {"height": 4, "width": 4}
    assert read_parts(owner.examples, owner.pad_id, settings, folder).digests()["processor"] != first["processor"]
