"""timm's vision transformers through its wrapper in transformers; needs timm and torchvision (the extra ``timm``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_backends import PilBackend

if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
    # torchvision must be of the same build as torch, else transformers can't be imported beside it at all
    pytest.skip("needs timm and a torchvision that fits torch: pip install 'offsite-fl[timm]'", allow_module_level=True)

from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import Context, parse_emulator, start
from offsite_fl.emulators.report import planned_network
from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.network import NetworkPlan, build_network
from offsite_fl.models.split import Split
from offsite_fl.models.tasks import build_model
from offsite_fl.owner import ModelOwner

from .checks import check_row, inputs_of
from .families import IMAGE, built, output_of, processor_of
from .other_families import TIMM

SPECS = ["low-rank:keep=0.5", "prune:keep=0.5", "crash:keep=2", "scaleot:steps=2", "distill:steps=2"]
PIXELS = {"input_size": [3, IMAGE, IMAGE], "crop_pct": 0.8, "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3]}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", TIMM)
def test_it_works_as_a_family_of_transformers_does(name: str, tmp_path: Path) -> None:
    check_row(TIMM[name], tmp_path)


@pytest.mark.parametrize("name", ["ViT", "EVA-02"])
@pytest.mark.parametrize(
    "spec", ["low-rank:keep=0.5", "prune:keep=0.5", "crash:keep=2", "scaleot:steps=2", "distill:steps=2"]
)
def test_emulators_that_run_the_model_or_its_blocks(name: str, spec: str) -> None:
    model, batch = built(TIMM[name]), inputs_of(TIMM[name]) | {"labels": torch.tensor([0, 1])}
    context = Context(model, find_blocks(model), (0, 5), (1, 2, 3, 4), (batch, batch), (batch, batch))
    emulator = parse_emulator(spec).compress(start(context), context)
    with torch.no_grad():
        assert output_of(planned_network(emulator, context)[0], inputs_of(TIMM[name])).isfinite().all()


@pytest.mark.parametrize("name", ["ViT", "EVA-02"])
def test_tuning_trains_blocks_and_head_and_plugs_in(name: str, tmp_path: Path) -> None:
    model = built(TIMM[name])
    owner = ModelOwner(model, processor_of(TIMM[name]), Split(first=1, last=1))
    assert owner.head == ("timm_model.head.weight", "timm_model.head.bias")
    data_owner = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"), device="cpu")
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    update = data_owner.tune(
        Dataset.from_dict({"image": pictures, "label": [0, 1]}), TuneConfig(max_steps=1, batch_size=2, device="cpu")
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    owner.plug_in(update)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    inside = ("timm_model.blocks.0.", "timm_model.blocks.5.", "timm_model.head.")
    assert changed and all(n.startswith(inside) for n in changed)
    assert {n for n in changed if n.startswith("timm_model.head.")} == set(owner.head)


def test_a_checkpoint_says_no_depth_and_is_opened_from_its_folder(tmp_path: Path) -> None:
    # as on the hub: the architecture's name and what its pixels are, no arguments
    config = AutoConfig.for_model("timm_wrapper", architecture="test_vit", num_labels=3, pretrained_cfg=PIXELS)
    model: Any = build_model("image-classification", config).eval()
    model.save_pretrained(tmp_path / "model")
    owner = ModelOwner.from_pretrained(tmp_path / "model", Split(first=1, last=1), device="cpu")
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    assert owner.blocks.depth == 6 and bundle.plan.config["model_args"] == {"depth": 4}
    batch = {"pixel_values": torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        assert torch.equal(output_of(owner.model, batch), output_of(model, batch))
        assert output_of(DataOwner.open(bundle, device="cpu").model, batch).isfinite().all()


@pytest.mark.parametrize("size", [(40, 25), (25, 40), (33, 33)])
def test_pixels_are_those_of_timms_own_processor(size: tuple[int, int], tmp_path: Path) -> None:
    config = AutoConfig.for_model("timm_wrapper", architecture="test_vit", num_labels=3, pretrained_cfg=PIXELS)
    config.save_pretrained(tmp_path)
    build_model("image-classification", config).save_pretrained(tmp_path)  # type: ignore[operator]
    owner = ModelOwner.from_pretrained(tmp_path, Split(first=1, last=1), device="cpu")
    assert isinstance(owner.processor, PilBackend)
    theirs: Any = AutoImageProcessor.from_pretrained(str(tmp_path))
    assert not isinstance(theirs, PilBackend)
    image: Any = noise(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    got = owner.processor(image, return_tensors="pt")["pixel_values"]  # type: ignore[operator]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_stages_are_refused_through_timm_too() -> None:
    arguments = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
    config = AutoConfig.for_model("timm_wrapper", architecture="convnext_tiny", model_args=arguments, num_labels=3)
    with pytest.raises(ModelError, match="no list of repeated blocks in TimmWrapperForImageClassification"):
        ModelOwner(build_model("image-classification", config), processor_of(TIMM["ViT"]), Split(first=1, last=1))


def test_a_foreign_depth_is_refused_before_blocks_are_made(tmp_path: Path) -> None:
    owner = ModelOwner(built(TIMM["ViT"]), processor_of(TIMM["ViT"]), Split(first=1, last=1))
    plan = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle").plan.to_json()
    plan["config"]["model_args"]["depth"] = 5000
    with pytest.raises(ModelError, match="the config makes 5000 blocks, the layout has 4"):
        build_network(NetworkPlan.from_json(plan))
