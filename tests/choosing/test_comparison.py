"""The loop on a pico model: what an interruption costs, and that numbers in memory are those of the two parties."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

from offsite_fl.choosing import Choice, choose
from offsite_fl.choosing.bench import Bench
from offsite_fl.choosing.parts import read_parts
from offsite_fl.choosing.settings import Settings
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ConfigError, OffsiteError
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.choosing.conftest import cell

PUBLIC = Dataset.from_dict({"text": ["the cat sat on the mat and the dog lay by the door. " * 40]})
PRIVATE = Dataset.from_dict({"text": ["seven bright ships went out to sea and three came home again; " * 40]})
FAST = TuneConfig(max_steps=2, lr=1e-2, batch_size=4, block_size=16, progress=False)
SPEC = "layer-drop:keep=0.5"
BOTH = (SPEC, "first:keep=0.5")


@pytest.fixture
def owner(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> ModelOwner:
    return ModelOwner(pico_llama, pico_tokenizer, Split(first=1, last=1))


def compare(owner: ModelOwner, out: Path, **changes: Any) -> Choice:
    given: dict[str, Any] = {"candidates": (SPEC,), "data": PRIVATE, "tune": FAST, "held_out_tokens": 64}
    return choose(owner, calibration=PUBLIC, out=out, **(given | changes))


def cells(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def specs(out: Path) -> list[str]:
    return [line["spec"] for line in cells(out)]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Values, and what a forgotten training session would leave behind."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return values, flags, [module.training for module in model.modules()]


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    values = before[0].keys() == after[0].keys() and all(torch.equal(t, after[0][n]) for n, t in before[0].items())
    return bool(values and before[1:] == after[1:])


def failing(error: BaseException, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the candidate ``spec`` raise ``error`` after its tuning, with its update plugged in."""
    real = Bench.candidate

    def candidate(self: Bench, method: Any, *more: Any) -> Any:
        found = real(self, method, *more)
        if str(method) == spec:
            with self.owner.plugged_in({n: t + 1 for n, t in self.owner.adapter().items()}):
                raise error
        return found

    monkeypatch.setattr(Bench, "candidate", candidate)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells come with made-up numbers at once, for tests that ask only which ones are measured."""
    made = cell()
    for name in ("candidate", "uncompressed"):
        monkeypatch.setattr(Bench, name, lambda *_: (made.built, made.public, made.tuned))


def test_an_interruption_loses_one_cell_and_leaves_the_model(
    owner: ModelOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(owner.model)
    with monkeypatch.context() as patch:
        failing(KeyboardInterrupt(), "first", patch)  # keep=0.5 is the default, which str() leaves out
        with pytest.raises(KeyboardInterrupt):
            compare(owner, tmp_path, candidates=BOTH)
    assert specs(tmp_path) == ["uncompressed", SPEC]
    assert same(before, state_of(owner.model))
    compare(owner, tmp_path, candidates=BOTH)
    assert specs(tmp_path) == ["uncompressed", SPEC, "first:keep=0.5"]
    assert same(before, state_of(owner.model))


def test_a_methods_own_bug_is_a_row_and_is_tried_again(
    owner: ModelOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(RuntimeError("no such\nkernel " + "x" * 1000), "first", patch)
        choice = compare(owner, tmp_path, candidates=BOTH)
    broken = choice.standings[-1]
    assert broken.verdict == "failed" and broken.errors[0].startswith("RuntimeError: no such kernel xxx")
    assert len(broken.errors[0]) < 350 and "Traceback" in (tmp_path / "errors.log").read_text()
    mended = compare(owner, tmp_path, candidates=BOTH)
    assert all(standing.errors == () for standing in mended.standings)
    assert len(cells(tmp_path)) == 4  # the reference, the good one, the failed one, and that one again


def test_a_reference_that_can_not_be_had_ends_the_run(owner: ModelOwner, tmp_path: Path) -> None:
    with pytest.raises(OffsiteError, match="'q_prj' isn't in the adapter"):
        compare(owner, tmp_path, tune=replace(FAST, lora_rank=2, lora_targets=("q_prj",)))


def test_a_rate_that_diverges_is_out(owner: ModelOwner, tmp_path: Path) -> None:
    compare(owner, tmp_path, rates=(1e30, 1e-2))
    for line in cells(tmp_path):
        tried = {entry["rate"]: entry["validation_loss"] for entry in line["tuned"]["rates"]}
        assert line["tuned"]["rate"] == 1e-2 and tried[1e30] is None and tried[1e-2] > 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_numbers_are_those_of_the_two_parties(owner: ModelOwner, tmp_path: Path, lora_rank: int) -> None:
    """The same by way of a bundle on disk, a data owner who opens it, and the five rows."""
    config = replace(FAST, lora_rank=lora_rank)
    before = state_of(owner.model)
    compare(owner, tmp_path / "choice", tune=config, seeds=(3,), repair=True)
    assert same(before, state_of(owner.model))
    found = cells(tmp_path / "choice")[1]["tuned"]
    settings = Settings(tune=config, held_out_tokens=64)
    texts = read_parts(owner.examples, owner.pad_id, settings, PUBLIC, PRIVATE)
    assert texts.private is not None
    bundle = owner.make_bundle(SPEC, tmp_path / "bundle", seed=3)
    update = DataOwner.open(bundle).tune(
        texts.private.train, replace(config, seed=3), validation=texts.private.validation
    )
    measure = Measure(owner, texts.private.test, block_size=16)
    repair = owner.measure_repair(texts.calibration, replace(config, seed=3))
    expected = {
        "zero_shot": measure.full_zero_shot(),
        "emulator_zero_shot": measure.emulator_zero_shot(),
        "emulator_tuned": measure.emulator_tuned(update.tensors, update.lora),
        "plug_in": measure.plug_in(update.tensors, update.lora),
        "without_repair": measure.plug_in(update.tensors, update.lora, repair),
    }
    for name, row in expected.items():
        assert found[name] == pytest.approx(row.loss, abs=1e-5), name
    assert found["plug_in"] != pytest.approx(found["zero_shot"], abs=1e-4)
    assert found["without_repair"] != pytest.approx(found["plug_in"], abs=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_on_the_uncompressed_middle_the_emulator_is_the_model(
    owner: ModelOwner, tmp_path: Path, lora_rank: int
) -> None:
    compare(owner, tmp_path, tune=replace(FAST, lora_rank=lora_rank))
    tuned = cells(tmp_path)[0]["tuned"]
    assert tuned["emulator_zero_shot"] == pytest.approx(tuned["zero_shot"], abs=1e-5)
    assert tuned["emulator_tuned"] == pytest.approx(tuned["plug_in"], abs=1e-5)


def test_scaled_updates(owner: ModelOwner, tmp_path: Path) -> None:
    """At scale 1 it is the plain plug-in, next to 0 the untuned model."""
    compare(owner, tmp_path, scales=(1e-6, 1.0))
    for line in cells(tmp_path):
        losses = {tried["scale"]: tried["plug_in"] for tried in line["tuned"]["scales"]}
        assert losses[1.0] == pytest.approx(line["tuned"]["plug_in"], abs=1e-6)
        assert losses[1e-6] == pytest.approx(line["tuned"]["zero_shot"], abs=1e-4)
        assert abs(losses[1.0] - losses[1e-6]) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (1,)},
        {"rates": (2e-2,)},
        {"tune": replace(FAST, max_steps=3)},
        {"tune": replace(FAST, weight_decay=0.1)},
        {"data": PUBLIC},
        {"data": None},
        {"calibration_tokens": 256},
        {"test_tokens": 16},
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_what_changes_the_numbers_is_measured_anew(owner: ModelOwner, tmp_path: Path, changes: dict[str, Any]) -> None:
    compare(owner, tmp_path)
    compare(owner, tmp_path, **changes)
    assert len(cells(tmp_path)) == 4


@pytest.mark.usefixtures("unmeasured")
def test_another_model_or_split_is_measured_anew(owner: ModelOwner, tmp_path: Path, pico: Callable[..., Any]) -> None:
    compare(owner, tmp_path)
    compare(ModelOwner(pico("llama", seed=1), owner.tokenizer, Split(first=1, last=1)), tmp_path)
    compare(ModelOwner(owner.model, owner.tokenizer, Split(first=1, last=2)), tmp_path, candidates=("first:keep=2",))
    assert len(cells(tmp_path)) == 6


@pytest.mark.usefixtures("unmeasured")
def test_a_budget_changes_only_what_it_sizes(owner: ModelOwner, tmp_path: Path) -> None:
    """The reference and a candidate with a size of its own serve any budget."""
    candidates = ("layer-drop:{keep}", "first:keep=2")
    compare(owner, tmp_path, candidates=candidates, budget="50%")
    compare(owner, tmp_path, candidates=candidates, budget="75%")
    assert specs(tmp_path) == [
        "uncompressed",
        "layer-drop:keep=0.5",
        "first:keep=2",
        "layer-drop:keep=0.75",
    ]


def test_long_methods_get_a_folder_that_goes_with_the_cell(
    owner: ModelOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "layer-drop:keep=0.5+distill:steps=2,eval-every=1"
    with monkeypatch.context() as patch:
        failing(KeyboardInterrupt(), spec.replace(":keep=0.5", ""), patch)
        with pytest.raises(KeyboardInterrupt):
            compare(owner, tmp_path, candidates=(spec,))
    assert list((tmp_path / "work").rglob("state.safetensors"))
    compare(owner, tmp_path, candidates=(spec,))
    assert not (tmp_path / "work").exists()
    assert cells(tmp_path)[-1]["spec"] == spec


@pytest.mark.usefixtures("unmeasured")
def test_a_repair_is_measured_where_it_is_asked_for(owner: ModelOwner, tmp_path: Path) -> None:
    """The reference has none, so it serves both."""
    compare(owner, tmp_path)
    compare(owner, tmp_path, repair=True)
    assert specs(tmp_path) == ["uncompressed", SPEC, SPEC]


def test_options_of_classifiers_are_refused(owner: ModelOwner, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"test-examples doesn't fit a model for causal-lm.* give test-tokens"):
        compare(owner, tmp_path, test_examples=5)
    with pytest.raises(ConfigError, match="head-from is for classifiers"):
        compare(owner, tmp_path, head_from="model")


def test_families(
    family: str, pico: Callable[..., Any], pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    owner = ModelOwner(pico(family), pico_tokenizer, Split(first=1, last=1))
    before = state_of(owner.model)
    choice = compare(owner, tmp_path, candidates=("layer-drop:{keep}",))
    assert choice.standings[0].verdict != "failed", choice.standings[0].errors
    assert same(before, state_of(owner.model))
