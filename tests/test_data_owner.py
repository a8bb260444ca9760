"""Which LoRA factors a data owner trains, and on what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_pico, make_tokenizer

LORA = TuneConfig(
    max_steps=3, lr=1e-2, batch_size=2, block_size=12, lora_rank=2, lora_alpha=4.0, progress=False, device="cpu"
)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    found = ModelOwner(make_pico("gpt2"), make_tokenizer(), Split(first=1, last=1))
    found.make_bundle("layer-drop:keep=2", tmp_path_factory.mktemp("owner") / "bundle")
    return found


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.txt"
    path.write_text("rain falls on the hills. " * 12)
    return str(path)


def opened(owner: ModelOwner) -> DataOwner:
    assert owner.bundle is not None
    return DataOwner.open(owner.bundle, device="cpu")


def moved(start: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in values if not torch.equal(values[name], start[name])}


def begun(owner: ModelOwner) -> dict[str, torch.Tensor]:
    """Factors with a B that isn't zero, so that A gets a gradient."""
    factors = owner.initial_state(LORA.lora)
    generator = torch.Generator().manual_seed(1)
    return {n: t if "lora_A" in n else torch.randn(t.shape, generator=generator) * 0.05 for n, t in factors.items()}


@pytest.mark.parametrize("mu", [0.0, 5.0])
@pytest.mark.parametrize("train", ["a", "b"])
def test_one_factor_is_trained_and_the_other_stays(owner: ModelOwner, data: str, train: str, mu: float) -> None:
    start = begun(owner)
    config = dataclasses.replace(LORA, lora_train=train, proximal_mu=mu)  # type: ignore[arg-type]
    update = opened(owner).tune(data, config, start=start)
    assert update.tensors.keys() == start.keys() and update.lora == LORA.lora
    assert moved(start, dict(update.tensors)) == {name for name in start if f"lora_{train.upper()}" in name}
    owner.plug_in(update)


def test_the_proximal_term_of_one_factor_is_that_of_the_product(owner: ModelOwner, data: str) -> None:
    """The gradient of mu/2 ||s (B - B0) A||^2 is mu s^2 (B - B0) A A': nothing in step 1, and in step 2 by hand."""
    start, lr, mu = begun(owner), 0.02, 2.0
    config = dataclasses.replace(LORA, lora_train="b", optimizer="sgd", lr=lr, clip_norm=0.0)

    def after(steps: int, weight: float) -> dict[str, torch.Tensor]:
        settings = dataclasses.replace(config, max_steps=steps, proximal_mu=weight)
        return dict(opened(owner).tune(data, settings, start=start).tensors)

    one, without, with_term = after(1, mu), after(2, 0.0), after(2, mu)
    for name in (n for n in start if "lora_B" in n):
        a = start[name.replace("lora_B", "lora_A")]
        pull = mu * (4.0 / 2) ** 2 * (one[name] - start[name]) @ a @ a.T
        torch.testing.assert_close(with_term[name] - without[name], -lr * pull, rtol=1e-2, atol=1e-7)
        assert float(pull.abs().max()) > 0


def test_fresh_factors_go_on_top_of_the_adapter_that_came(owner: ModelOwner, data: str) -> None:
    fresh = dataclasses.replace(LORA, lora_fresh=True)
    other = {name: value + 0.05 for name, value in owner.initial_state().items()}
    whole = opened(owner).tune(data, fresh, start=other)
    factors = opened(owner).tune(data, fresh, start=other, merge=False)
    assert whole.lora is None and whole.tensors.keys() == other.keys() and factors.lora == LORA.lora
    changed = moved(other, dict(whole.tensors))
    assert changed == {n.replace(".lora_B", "") for n in factors.tensors if "lora_B" in n}
    for name in changed:
        base = name.removesuffix(".weight")
        product = factors.tensors[f"{base}.lora_B.weight"] @ factors.tensors[f"{base}.lora_A.weight"]
        torch.testing.assert_close(whole.tensors[name], other[name] + 2.0 * product.T)  # GPT-2 stores [in, out]
    owner.plug_in(whole)
    # on the bundle's own adapter they are ordinary factors
    plain = opened(owner).tune(data, LORA)
    begun_there = opened(owner).tune(data, fresh, start=owner.initial_state(), merge=False)
    assert all(torch.equal(plain.tensors[name], begun_there.tensors[name]) for name in plain.tensors)


def test_the_repair_is_measured_for_fresh_factors_as_for_others(owner: ModelOwner, data: str) -> None:
    plain = owner.measure_repair(data, LORA)
    fresh = owner.measure_repair(data, dataclasses.replace(LORA, lora_fresh=True))
    assert all(torch.equal(plain.tensors[name], fresh.tensors[name]) for name in plain.tensors)
