"""The two parties together on pico models: what leaves, what comes back, what changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from offsite_fl.bundle import OwnerMap
from offsite_fl.config import LoraOptions, TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import BundleError, ModelError, SplitError, UpdateError
from offsite_fl.measure import Measure
from offsite_fl.models.plug import adapter_tensors
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.update import Update
from tests.conftest import make_pico, make_tokenizer

TEXT = Dataset.from_dict({"text": ["the cat sat on the mat and the dog lay by the door. " * 40]})
FAST = TuneConfig(max_steps=3, lr=1e-2, batch_size=2, block_size=16, progress=False)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture
def owner(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> ModelOwner:
    return ModelOwner(pico_llama, pico_tokenizer, Split(first=1, last=1))


def test_client_logits_equal_the_owners_emulator(
    family: str,
    pico: Callable[..., nn.Module],
    pico_tokenizer: PreTrainedTokenizerFast,
    pico_batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    owner = ModelOwner(pico(family), pico_tokenizer, Split(first=1, last=1))
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    inputs = {name: pico_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = DataOwner.open(tmp_path / "bundle").model(**inputs).logits
        ours = owner.emulated(bundle)(**inputs).logits
    assert torch.equal(theirs, ours)


def test_an_uncompressed_middle_computes_the_full_model(
    family: str,
    pico: Callable[..., nn.Module],
    pico_tokenizer: PreTrainedTokenizerFast,
    pico_batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    owner = ModelOwner(pico(family), pico_tokenizer, Split(at=(0, 3, 5)))
    owner.make_bundle("low-rank:keep=1", tmp_path / "bundle")  # keep=1 leaves every matrix as it is
    inputs = {name: pico_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = owner.model(**inputs).logits
        got = DataOwner.open(tmp_path / "bundle").model(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_plug_in_changes_exactly_the_adapter(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    before = state_of(owner.model)
    update = DataOwner.open(bundle).tune(TEXT, FAST)
    assert changed(before, owner.model) == set()
    owner.plug_in(update)
    inside = ("model.layers.0.", "model.layers.5.")
    assert changed(before, owner.model) == {name for name in before if name.startswith(inside)}


@pytest.mark.parametrize(("split", "blocks"), [(Split(0, 2), (4, 5)), (Split(2, 0), (0, 1))], ids=str)
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_one_sided_splits_of_a_merged_peft_model_go_the_whole_way(
    split: Split, blocks: tuple[int, ...], lora_rank: int, pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Fault 3: LoRA on LLaMA found no blocks, and both ends were held to one block at least."""
    merged = get_peft_model(make_pico("llama"), LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    owner = ModelOwner(merged, pico_tokenizer, split)
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    before = state_of(owner.model)
    owner.plug_in(DataOwner.open(bundle).tune(TEXT, replace(FAST, lora_rank=lora_rank)))
    found = changed(before, owner.model)
    assert {int(name.split(".")[2]) for name in found} == set(blocks)
    assert all(name.startswith("model.layers.") for name in found)


def test_an_untouched_adapter_gives_the_full_model_back_bit_for_bit(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle", dtype=torch.bfloat16)
    before = state_of(owner.model)
    owner.plug_in(Update(DataOwner.open(bundle).adapter(), bundle.digest, 1))
    assert changed(before, owner.model) == set()


def test_lora_update_merges_into_the_handed_out_adapter_once(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    config = TuneConfig(max_steps=3, lr=1e-2, batch_size=2, block_size=16, lora_rank=2, progress=False)
    update = DataOwner.open(bundle).tune(TEXT, config)
    assert all(".lora_" in name for name in update.tensors)
    name = "adapter.0.self_attn.q_proj"
    weight = owner.adapter()[f"{name}.weight"]
    a, b = update.tensors[f"{name}.lora_A.weight"], update.tensors[f"{name}.lora_B.weight"]
    for _ in range(2):  # values, not differences: twice is the same as once
        owner.plug_in(update)
        torch.testing.assert_close(owner.adapter()[f"{name}.weight"], weight + config.lora_alpha / 2 * (b @ a))
    assert float(b.abs().sum()) > 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_tuning_leaves_everything_frozen_as_it_was(owner: ModelOwner, tmp_path: Path, lora_rank: int) -> None:
    data_owner = DataOwner.open(owner.make_bundle("layer-drop:keep=2+quantize:bits=8,group=16", tmp_path / "bundle"))
    before = state_of(data_owner.model)
    config = TuneConfig(max_steps=2, lr=1e-2, batch_size=2, block_size=16, lora_rank=lora_rank, progress=False)
    update = data_owner.tune(TEXT, config)
    moved = changed(before, data_owner.model)
    adapter = {n for n in before if n.startswith(("model.layers.0.", "model.layers.3."))}
    assert moved == (adapter if lora_rank == 0 else set())
    assert update.num_examples > 0
    assert update.metrics["train-loss"] > 0


def test_start_begins_with_the_given_values(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    one, two = DataOwner.open(bundle), DataOwner.open(bundle)
    first = one.tune(TEXT, FAST)
    onward, taken_up = one.tune(TEXT, FAST), two.tune(TEXT, FAST, start=first.tensors)
    assert not torch.equal(*(u.tensors["adapter.0.mlp.up_proj.weight"] for u in (first, onward)))
    assert all(torch.equal(onward.tensors[name], tensor) for name, tensor in taken_up.tensors.items())
    two.reset()
    assert all(torch.equal(value, owner.adapter()[name]) for name, value in two.adapter().items())


def test_update_for_another_bundle_is_refused(owner: ModelOwner, tmp_path: Path) -> None:
    first = owner.make_bundle("layer-drop:keep=2", tmp_path / "first")
    owner.make_bundle("layer-drop:keep=3", tmp_path / "second")
    before = state_of(owner.model)
    with pytest.raises(UpdateError, match="made for bundle"):
        owner.plug_in(Update(DataOwner.open(first).adapter(), first.digest, 1))
    assert changed(before, owner.model) == set()


def test_broken_values_change_nothing(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    before, values = state_of(owner.model), DataOwner.open(bundle).adapter()
    name = "adapter.1.mlp.up_proj.weight"
    bad = values | {name: torch.full_like(values[name], torch.nan)}
    for tensors, named in ((bad, name), ({**values, "adapter.7.x": values[name]}, "adapter.7.x")):
        with pytest.raises(UpdateError, match=named):
            owner.plug_in(Update(tensors, bundle.digest, 1))
        with pytest.raises(UpdateError):
            DataOwner.open(bundle).load_adapter(tensors)
    assert changed(before, owner.model) == set()


def test_nothing_that_leaves_tells_where_it_came_from(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    text = json.dumps(manifest)
    assert "layer-drop" not in text
    assert manifest["plan"]["config"]["num_hidden_layers"] == 4  # 1 + 2 + 1 of the full model's 6
    assert all(not name.startswith("model.layers") for name in bundle.tensors())
    note = OwnerMap.load(bundle.path)
    assert note.slots["emulator.1.mlp.up_proj.weight"] == "model.layers.4.mlp.up_proj.weight"
    assert note.slots["adapter.1.mlp.up_proj.weight"] == "model.layers.5.mlp.up_proj.weight"
    assert note.emulator == "layer-drop:keep=2"


def test_use_bundle_takes_up_an_earlier_one(
    owner: ModelOwner, pico: Callable[..., nn.Module], pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    again = ModelOwner(owner.model, pico_tokenizer, Split(first=1, last=1))
    assert again.use_bundle(bundle.path).digest == bundle.digest
    with pytest.raises(SplitError, match="split"):
        ModelOwner(owner.model, pico_tokenizer, Split(first=2, last=2)).use_bundle(bundle.path)
    with pytest.raises(BundleError, match="another full model"):
        ModelOwner(pico("llama", hidden_size=16), pico_tokenizer, Split(first=1, last=1)).use_bundle(bundle.path)


def test_plugged_in_is_undone(owner: ModelOwner, tmp_path: Path) -> None:
    update = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")).tune(TEXT, FAST)
    before = state_of(owner.model)
    with owner.plugged_in(update.tensors) as model:
        assert changed(before, model)
    assert changed(before, owner.model) == set()


def test_the_adapted_model_is_an_ordinary_hugging_face_folder(owner: ModelOwner, tmp_path: Path) -> None:
    owner.plug_in(DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")).tune(TEXT, FAST))
    again = AutoModelForCausalLM.from_pretrained(owner.save(tmp_path / "adapted"))
    for name, tensor in owner.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_initial_lora_state_changes_nothing(owner: ModelOwner, tmp_path: Path) -> None:
    owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    options = LoraOptions(rank=2)
    values = owner.adapter_values(owner.initial_state(options, seed=3), options)
    live = adapter_tensors(owner.model, owner.blocks, owner.adapter_indices)
    assert all(torch.equal(values[name], parameter.detach()) for name, parameter in live.items())


def test_causal_masks_of_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    # The paper's own GPT-2 emulators carry each block's mask (33.6 MB), which newer libraries refuse (fault 8).
    model = make_pico("gpt2")
    model.save_pretrained(tmp_path / "old")  # type: ignore[operator]
    make_tokenizer().save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    masks = {
        f"transformer.h.{i}.attn.bias": torch.ones(128, 128, dtype=torch.bool).tril()[None, None].clone()
        for i in range(6)
    }
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(6)}
    save_file(load_file(file) | masks, file, metadata={"format": "pt"})
    owner = ModelOwner.from_pretrained(tmp_path / "old", Split(1, 1))
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    assert not [name for name in bundle.tensors() if name.endswith((".attn.bias", ".masked_bias"))]
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(owner.model(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(DataOwner.open(bundle).model(input_ids=ids).logits, owner.emulated()(input_ids=ids).logits)


def test_lora_after_full_tuning_is_worth_the_same_on_both_sides(owner: ModelOwner, tmp_path: Path) -> None:
    data_owner = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"))
    data_owner.tune(TEXT, FAST)
    update = data_owner.tune(TEXT, replace(FAST, lora_rank=2))
    fresh = DataOwner.open(tmp_path / "bundle").tune(TEXT, replace(FAST, lora_rank=2))
    assert all(torch.equal(update.tensors[name], fresh.tensors[name]) for name in fresh.tensors)


def test_a_taken_up_bundle_brings_its_report(owner: ModelOwner, tmp_path: Path) -> None:
    owner.make_bundle("quantize:bits=8,group=16", tmp_path / "bundle", dtype=torch.bfloat16, shard_bytes="16KB")
    report, spec = owner.report, owner.emulator
    written = [shard for shard in owner.bundle.manifest.shards if shard.kind == "emulator"]  # type: ignore[union-attr]
    assert report is not None and len(written) > 1
    assert report.bytes == sum(entry.bytes for shard in written for entry in shard.tensors.values())
    again = ModelOwner(owner.model, owner.tokenizer, owner.split)
    again.use_bundle(tmp_path / "bundle")
    assert (again.report, again.emulator) == (report, spec) and spec == "quantize:group=16"


def test_another_model_of_the_same_shape_is_noticed(owner: ModelOwner, tmp_path: Path) -> None:
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    other = ModelOwner(make_pico("llama", seed=1), owner.tokenizer, owner.split)
    with pytest.raises(BundleError, match="another full model"):
        other.use_bundle(bundle)
    owner.plug_in(DataOwner.open(bundle).tune(TEXT, FAST))
    owner.use_bundle(bundle)  # adapted, it is still the model that the bundle was made of


def test_a_peft_wrapper_is_to_be_merged_first(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> None:
    wrapped = get_peft_model(pico_llama, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        ModelOwner(wrapped, pico_tokenizer)
    ModelOwner(wrapped.merge_and_unload(), pico_tokenizer)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_both_parties_and_the_measuring_are_on_one_device(
    device: str, pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pico_llama.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    pico_tokenizer.save_pretrained(tmp_path / "model")
    owner = ModelOwner.from_pretrained(tmp_path / "model", Split(1, 1), device=device)
    bundle = owner.make_bundle("low-rank:keep=0.5", tmp_path / "bundle", calibration=TEXT, block_size=16)
    data_owner = DataOwner.open(bundle, device=device)
    config = replace(FAST, device=device)
    before = data_owner.evaluate(TEXT, config).loss
    update = data_owner.tune(TEXT, config)
    assert data_owner.evaluate(TEXT, config).loss < before
    measure = Measure(owner, TEXT, block_size=16, device=device)
    assert measure.emulator_zero_shot().loss == pytest.approx(before, abs=0.05)  # bf16 at a data owner with a GPU
    assert measure.plug_in(update.tensors).loss != measure.full_zero_shot().loss
    found = {parameter.device.type for network in (owner.model, data_owner.model) for parameter in network.parameters()}
    assert found == {device}
    owner.plug_in(update)
