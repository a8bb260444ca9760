"""What tuning repairs in the emulator only: measured by the owner, taken out at plug-in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ConfigError, UpdateError
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.repair import Repair
from offsite_fl.update import Update

PUBLIC = Dataset.from_dict({"text": ["the cat sat on the mat and the dog lay by the door. " * 40]})
PRIVATE = Dataset.from_dict({"text": ["seven bright ships went out to sea and three came home again; " * 40]})
FAST = TuneConfig(max_steps=3, lr=1e-2, batch_size=2, block_size=16, progress=False)
LORA = replace(FAST, lora_rank=2)


@pytest.fixture
def owner(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> ModelOwner:
    return ModelOwner(pico_llama, pico_tokenizer, Split(first=1, last=1))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_taken_out_by_hand() -> None:
    """2 + 0.5 * (6 - 2 - 0.25 * 8) = 3."""
    repair = Repair({"w": torch.tensor([8.0])}, "", 1, share=0.25, scale=0.5)
    assert repair.taken_out({"w": torch.tensor([6.0])}, {"w": torch.tensor([2.0])}) == {"w": torch.tensor([3.0])}


def test_another_adapter_does_not_fit() -> None:
    with pytest.raises(UpdateError, match=r"doesn't fit the adapter.*'v'"):
        Repair({"w": torch.zeros(1)}, "", 1).taken_out({"v": torch.zeros(1)}, {"v": torch.zeros(1)})


@pytest.mark.parametrize("setting", [{"share": -0.1}, {"scale": float("nan")}, {"share": float("inf")}])
def test_impossible_numbers(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"repair (share|scale) must be a number from 0"):
        Repair({}, "", 1, **setting)


def test_file_and_back(tmp_path: Path) -> None:
    repair = Repair({"w": torch.tensor([1.5, -2.0])}, "abc", 7, share=0.5, scale=0.75)
    read = Repair.load(repair.save(tmp_path / "repair.safetensors"))
    assert torch.equal(read.tensors["w"], repair.tensors["w"])
    assert (read.digest, read.steps, read.share, read.scale) == ("abc", 7, 0.5, 0.75)


def test_an_update_is_no_repair(tmp_path: Path) -> None:
    path = Update({"w": torch.zeros(1)}, "abc", 1).save(tmp_path / "update.safetensors")
    with pytest.raises(UpdateError, match="is an update, not a repair"):
        Repair.load(path)


@pytest.mark.parametrize("config", [FAST, LORA], ids=["full", "lora"])
def test_where_nothing_is_wrong_there_is_nothing_to_repair(
    owner: ModelOwner, tmp_path: Path, config: TuneConfig
) -> None:
    owner.make_bundle("low-rank:keep=1", tmp_path / "bundle")
    repair = owner.measure_repair(PUBLIC, config)
    assert repair.steps == 3 and repair.tensors.keys() == owner.adapter().keys()
    for tensor in repair.tensors.values():
        assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [FAST, LORA], ids=["full", "lora"])
def test_it_is_the_difference_of_two_tunings(owner: ModelOwner, tmp_path: Path, config: TuneConfig) -> None:
    """The tuning on the full model is done here by a data owner whose emulator is the middle itself."""
    owner.make_bundle("low-rank:keep=1", tmp_path / "whole")
    on_full = owner.adapter_values(DataOwner.open(tmp_path / "whole").tune(PUBLIC, config).tensors, config.lora)
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    on_emulator = owner.adapter_values(DataOwner.open(bundle).tune(PUBLIC, config).tensors, config.lora)
    repair = owner.measure_repair(PUBLIC, config)
    assert repair.digest == bundle.digest
    assert any(float(tensor.abs().max()) > 1e-3 for tensor in repair.tensors.values())
    for name, tensor in repair.tensors.items():
        assert_close(tensor, on_emulator[name] - on_full[name], rtol=1e-4, atol=1e-5)


def test_measuring_leaves_the_model_alone_even_with_an_update_in_it(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    first = owner.measure_repair(PUBLIC, FAST)
    owner.plug_in(DataOwner.open(bundle).tune(PRIVATE, FAST))
    before = state_of(owner.model)
    second = owner.measure_repair(PUBLIC, FAST)
    assert all(torch.equal(tensor, before[name]) for name, tensor in owner.model.state_dict().items())
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_plug_in_takes_it_out(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    handed_out = owner.adapter()
    update = DataOwner.open(bundle).tune(PRIVATE, FAST)
    repair = owner.measure_repair(PUBLIC, FAST, share=0.5)
    owner.plug_in(update, repair)
    for name, value in owner.adapter().items():
        expected = handed_out[name] + update.tensors[name] - handed_out[name] - 0.5 * repair.tensors[name]
        assert_close(value, expected, rtol=1e-5, atol=1e-6)
    measure = Measure(owner, PRIVATE, block_size=16)
    loss = measure.plug_in(update.tensors, repair=repair).loss
    assert loss == pytest.approx(measure.full_zero_shot().loss, abs=1e-5)  # that is what is plugged in already


def test_a_repair_for_another_bundle_is_refused(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    update = DataOwner.open(bundle).tune(PRIVATE, FAST)
    other = Repair({name: torch.zeros_like(t) for name, t in update.tensors.items()}, "f" * 64, 3)
    before = state_of(owner.model)
    with pytest.raises(UpdateError, match="the repair was made for bundle ffff"):
        owner.plug_in(update, other)
    with pytest.raises(UpdateError, match="Repair"):
        owner.plug_in(update, "repair.safetensors")  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in owner.model.state_dict().items())
