"""A class of model that the library has never heard of, with names of its own, goes all the way once registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import Blocks
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer


class TowerConfig(PretrainedConfig):  # type: ignore[misc,unused-ignore]
    model_type = "tower-of-a-test"

    def __init__(self, storeys: int = 6, breadth: int = 16, glyphs: int = 64, reach: tuple[int, ...] = (), **rest: Any):
        self.storeys, self.breadth, self.glyphs = storeys, breadth, glyphs
        self.reach = list(reach) or [1 + i % 3 for i in range(storeys)]  # one number a block
        super().__init__(**rest)


class Storey(nn.Module):
    """Mixes in the token ``reach`` places back, then a small MLP."""

    def __init__(self, breadth: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.mix, self.widen, self.narrow = (
            nn.Linear(breadth, breadth),
            nn.Linear(breadth, 2 * breadth),
            nn.Linear(2 * breadth, breadth),
        )

    def forward(self, bricks: torch.Tensor) -> torch.Tensor:
        earlier = nn.functional.pad(bricks, (0, 0, self.reach, 0))[:, : bricks.shape[1]]
        bricks = bricks + self.mix(earlier)
        out: torch.Tensor = bricks + self.narrow(torch.relu(self.widen(bricks)))
        return out


class TowerModel(PreTrainedModel):  # type: ignore[misc,unused-ignore]
    config_class = TowerConfig

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.ground = nn.Embedding(config.glyphs, config.breadth)
        self.shaft = nn.ModuleDict({"storeys": nn.ModuleList([Storey(config.breadth, r) for r in config.reach])})
        self.roof = nn.Linear(config.breadth, config.glyphs)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        bricks = self.ground(input_ids)
        for storey in self.shaft["storeys"]:  # type: ignore[attr-defined,union-attr]
            bricks = storey(bricks)
        return CausalLMOutput(logits=self.roof(bricks))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    AutoConfig.register(TowerConfig.model_type, TowerConfig, exist_ok=True)
    AutoModelForCausalLM.register(TowerConfig, TowerModel, exist_ok=True)


SPECS = ("layer-drop:keep=2", "low-rank:keep=0.5,mode=plain", "prune:keep=0.5+quantize:bits=8")


@pytest.mark.parametrize("spec", SPECS)
def test_the_whole_way(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    owner = ModelOwner(TowerModel(TowerConfig()), make_tokenizer(), Split(first=1, last=1))
    assert (owner.blocks, owner.task) == (Blocks("shaft.storeys", 6, "Storey"), "causal-lm")
    bundle = owner.make_bundle(spec, tmp_path / "bundle")
    data_owner = DataOwner.open(bundle, device="cpu")
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = owner.emulated()(input_ids=ids).logits
        assert torch.equal(data_owner.model(input_ids=ids).logits, expected)
    data = Dataset.from_dict({"text": ["the cat sat on the mat. " * 3]})
    update = data_owner.tune(data, TuneConfig(max_steps=2, block_size=16, batch_size=2, device="cpu"))
    before = {n: t.clone() for n, t in owner.model.state_dict().items()}
    owner.plug_in(update)
    changed = {n for n, t in owner.model.state_dict().items() if not torch.equal(t, before[n])}
    assert {n.split(".")[2] for n in changed} == {"0", "5"}


def test_dropping_by_the_full_models_own_code(tmp_path: Path) -> None:
    # the oracle: the same class with the dropped storeys taken out of its list by hand
    torch.manual_seed(0)
    model = TowerModel(TowerConfig()).eval()
    bundle = ModelOwner(model, make_tokenizer(), Split(first=1, last=1)).make_bundle("first:keep=2", tmp_path / "b")
    assert bundle.plan.config["storeys"] == 4 and bundle.plan.config["reach"] == [1, 2, 3, 3]
    ids = torch.arange(20).view(2, 10)
    storeys = model.shaft["storeys"]
    model.shaft["storeys"] = nn.ModuleList([storeys[i] for i in (0, 1, 2, 5)])  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(DataOwner.open(bundle).model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_config_that_has_no_defaults(tmp_path: Path) -> None:
    class Measured(TowerConfig):
        model_type = "tower-of-a-test-to-measure"
        has_no_defaults_at_init = True  # as transformers has it

        def __init__(self, glyphs: int, **rest: Any):
            super().__init__(glyphs=glyphs, **rest)

    class MeasuredModel(TowerModel):
        config_class = Measured

    AutoConfig.register(Measured.model_type, Measured)
    AutoModelForCausalLM.register(Measured, MeasuredModel)
    owner = ModelOwner(MeasuredModel(Measured(64)), make_tokenizer(), Split(first=1, last=1))
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    assert isinstance(DataOwner.open(bundle, device="cpu").model, MeasuredModel)


def test_a_class_that_is_not_registered_is_refused_at_once() -> None:
    class Unknown(TowerConfig):
        model_type = "unknown-to-all"

        def __init__(self, **rest: Any):
            super().__init__(**rest)

    class UnknownModel(TowerModel):
        config_class = Unknown

    with pytest.raises(ModelError, match=r"UnknownModel: it is none of the classes.*must be registered"):
        ModelOwner(UnknownModel(Unknown()), make_tokenizer(), Split(first=1, last=1))
