"""Factors on the emulator: ``W x + s B A x`` for every kind of linear, and no trace afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from offsite_fl.config import LoraOptions
from offsite_fl.data_owner import DataOwner, network_of
from offsite_fl.errors import ConfigError, UpdateError
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear
from offsite_fl.models.network import place_blocks
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.patch import Patch
from offsite_fl.tuning.emulator_lora import EmulatorLora, emulator_factors
from tests.conftest import make_pico, make_tokenizer

OPTIONS = LoraOptions(2, 6.0)
TEXT = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog. " * 6]})
CALIBRATION: dict[str, Any] = {"calibration": TEXT, "calibration_tokens": 240, "block_size": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], DataOwner]:
    """``made(family, emulator)`` opens a fresh network; each bundle is made once."""
    folder = tmp_path_factory.mktemp("bundles")
    bundles: dict[tuple[str, str], object] = {}

    def open_fresh(family: str, emulator: str) -> DataOwner:
        key = (family, emulator)
        if key not in bundles:
            owner = ModelOwner(make_pico(family), make_tokenizer(), Split(first=1, last=1))
            bundles[key] = owner.make_bundle(emulator, folder / str(len(bundles)), **CALIBRATION)
        return DataOwner.open(bundles[key], "float32")  # type: ignore[arg-type]

    return open_fresh


def shaken(lora: EmulatorLora) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in lora.parameters.items()}


def logits(owner: DataOwner, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = owner.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_the_merged_weights(
    family: str, made: Callable[[str, str], DataOwner], pico_batch: dict[str, torch.Tensor]
) -> None:
    owner, merged = made(family, "layer-drop:keep=2"), made(family, "layer-drop:keep=2")
    lora = EmulatorLora(owner.model, owner.plan, OPTIONS)
    assert torch.equal(logits(owner, pico_batch), logits(merged, pico_batch))  # every B is zero
    factors = shaken(lora)
    lora.load(factors)
    places = place_blocks(merged.model, merged.plan)
    for name in factors:
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        _, slot, path = stem.split(".", 2)
        index = next(i for i, p in enumerate(merged.plan.layout) if (p.role, p.slot) == ("emulator", int(slot)))
        module = places[index].get_submodule(path)
        product = 3.0 * factors[stem + ".lora_B.weight"] @ factors[name]  # alpha / rank = 3
        # GPT-2 stores [in, out]
        module.weight.data = module.weight.data + (product if isinstance(module, nn.Linear) else product.T)
    torch.testing.assert_close(logits(owner, pico_batch), logits(merged, pico_batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(owner, pico_batch), logits(made(family, "layer-drop:keep=2"), pico_batch))


@pytest.mark.parametrize(
    "emulator", ["low-rank:keep=0.5", "quantize:bits=4,group=16", "low-rank:keep=0.5+quantize:bits=8"]
)
def test_replaced_linears_take_factors_as_a_whole(
    emulator: str, made: Callable[[str, str], DataOwner], pico_batch: dict[str, torch.Tensor]
) -> None:
    owner = made("llama", emulator)
    kinds = (LowRankLinear, QuantizedLinear)
    assert any(isinstance(module, kinds) for module in owner.model.modules())
    lora = EmulatorLora(owner.model, owner.plan, OPTIONS)
    ends = {name.split(".", 2)[2].removesuffix(".weight").rpartition(".")[0] for name in lora.parameters}
    assert ends == {
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    }
    before = logits(owner, pico_batch)
    lora.load(shaken(lora))
    block = place_blocks(owner.model, owner.plan)[1]
    module, x = block.get_submodule("mlp.up_proj"), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = (lora.parameters[f"emulator.0.mlp.up_proj.lora_{n}.weight"] for n in "AB")
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.forward(x) + 3.0 * x @ a.T @ b.T)  # forward() runs no hook
    assert not torch.allclose(logits(owner, pico_batch), before)


def test_a_block_at_two_places_has_one_pair_of_factors(tmp_path: Path, pico_batch: dict[str, torch.Tensor]) -> None:
    owner = ModelOwner(make_pico("llama"), make_tokenizer(), Split(first=1, last=1))
    bundle = owner.make_bundle("crash:keep=2", tmp_path / "bundle", **CALIBRATION)
    network = network_of(bundle, "float32")
    emulated = [p.slot for p in bundle.plan.layout if p.role == "emulator"]
    assert len(emulated) > len(set(emulated))
    lora = EmulatorLora(network, bundle.plan, OPTIONS)
    assert {name.split(".")[1] for name in lora.parameters} == {str(slot) for slot in set(emulated)}
    assert len(lora._hooks) == 7 * len(emulated)


def test_patch_and_back_leaves_no_trace(
    made: Callable[[str, str], DataOwner], pico_batch: dict[str, torch.Tensor]
) -> None:
    owner = made("llama", "layer-drop:keep=2")
    before, values = logits(owner, pico_batch), {n: t.clone() for n, t in owner.model.state_dict().items()}
    lora = EmulatorLora(owner.model, owner.plan, OPTIONS)
    factors = shaken(lora)
    lora.remove()
    patch = Patch(factors, owner.bundle.digest, OPTIONS)
    assert owner.patch_digest is None
    owner.patch(patch)
    assert owner.patch_digest == patch.digest
    assert owner.model.state_dict().keys() == values.keys()
    owner.patch(patch)  # a second one takes the place of the first and isn't added to it
    once = logits(owner, pico_batch)
    owner.patch(None)
    assert torch.equal(logits(owner, pico_batch), before) and not torch.equal(once, before)
    owner.patch(patch)
    assert torch.equal(logits(owner, pico_batch), once)
    assert all(torch.equal(tensor, values[name]) for name, tensor in owner.model.state_dict().items())


def test_what_does_not_fit_is_refused_and_leaves_the_emulator_bare(made: Callable[[str, str], DataOwner]) -> None:
    owner = made("llama", "layer-drop:keep=2")
    lora = EmulatorLora(owner.model, owner.plan, OPTIONS)
    factors = shaken(lora)
    lora.remove()
    name = "emulator.0.mlp.up_proj.lora_A.weight"
    for change, message in (
        ({name: factors[name][:1]}, "has shape"),
        ({name: factors[name] * float("nan")}, "aren't finite"),
        ({"adapter.0.mlp.up_proj.lora_A.weight": factors[name]}, "unknown LoRA factor"),
    ):
        with pytest.raises(UpdateError, match=message):
            owner.patch(Patch({**factors, **change}, owner.bundle.digest, OPTIONS))
        assert owner.patch_digest is None
    with pytest.raises(UpdateError, match="the patch is for bundle ffffffffffff"):
        owner.patch(Patch(factors, "f" * 64, OPTIONS))


@pytest.mark.parametrize("emulator", ["layer-drop:keep=2", "low-rank:keep=0.5+quantize:bits=8"])
def test_shapes_are_known_before_any_factor_is_made(emulator: str, made: Callable[[str, str], DataOwner]) -> None:
    owner = made("llama", emulator)
    for options in (OPTIONS, LoraOptions(5, targets=("q_proj",))):
        lora = EmulatorLora(owner.model, owner.plan, options)
        expected = {name: tuple(p.shape) for name, p in lora.parameters.items()}
        lora.remove()
        assert list(emulator_factors(owner.model, owner.plan, options).items()) == list(expected.items())
    huge = emulator_factors(owner.model, owner.plan, LoraOptions(2**40))
    assert huge["emulator.0.self_attn.q_proj.lora_A.weight"] == (2**40, 32)


def test_a_patch_takes_no_memory_for_a_rank_that_it_only_names(made: Callable[[str, str], DataOwner]) -> None:
    owner = made("llama", "layer-drop:keep=2")
    names = emulator_factors(owner.model, owner.plan, OPTIONS)
    for tensors, message in (({}, "missing LoRA factor"), ({n: torch.zeros(1, 1) for n in names}, "has shape")):
        with pytest.raises(UpdateError, match=message):
            owner.patch(Patch(tensors, owner.bundle.digest, LoraOptions(2**40)))
    assert owner.patch_digest is None


def test_targets_and_dropout(made: Callable[[str, str], DataOwner]) -> None:
    owner = made("llama", "low-rank:keep=0.5")
    lora = EmulatorLora(owner.model, owner.plan, LoraOptions(2, targets=("q_proj", "mlp.up_proj")))
    assert {name.split(".", 2)[2].split(".lora")[0] for name in lora.parameters} == {"self_attn.q_proj", "mlp.up_proj"}
    lora.remove()
    with pytest.raises(ConfigError, match="'q_prj' isn't in the emulator; did you mean 'q_proj'"):
        EmulatorLora(owner.model, owner.plan, LoraOptions(2, targets=("q_prj",)))
    with pytest.raises(ConfigError, match="no dropout"):
        EmulatorLora(owner.model, owner.plan, LoraOptions(2, dropout=0.1))
