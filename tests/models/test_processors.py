"""Every party gets its pixels from PIL and NumPy, whatever is installed and whatever the owner brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from offsite_fl.errors import ModelError
from offsite_fl.models.processors import on_pil, open_processor
from offsite_fl.models.split import Split
from offsite_fl.models.timm_pixels import processor_of_timm
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer
from tests.pico_classifiers import SIDE, make_classifier, make_image_processor

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class ViTImageProcessor(TorchvisionBackend):  # type: ignore[misc]
    """What transformers makes where torchvision is installed, as far as that can be had without it."""

    size = {"height": SIDE, "width": SIDE}  # noqa: RUF012
    do_resize = do_rescale = do_normalize = True
    image_mean = image_std = (0.5, 0.5, 0.5)

    def _preprocess(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the owner's pixels were made by torchvision")


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_an_owner_with_torchvision_makes_the_pixels_that_the_bundle_makes(tmp_path: Path) -> None:
    owner: Any = ModelOwner(make_classifier("vit"), ViTImageProcessor(), Split(first=1, last=1))
    bundle, image = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"), noise(13, 11)
    ours, theirs, plain = (
        processor(image, return_tensors="pt")["pixel_values"]
        for processor in (owner.processor, bundle.processor(), make_image_processor())
    )
    assert torch.equal(ours, theirs) and torch.equal(ours, plain)
    assert isinstance(owner.processor, PilBackend) and isinstance(bundle.processor(), PilBackend)


def test_files_of_either_backend_are_opened_on_pil(tmp_path: Path) -> None:
    ViTImageProcessor().save_pretrained(tmp_path / "torchvision")
    make_image_processor().save_pretrained(tmp_path / "pil")
    for name in ("torchvision", "pil"):
        opened = open_processor(str(tmp_path / name), "image-classification")
        assert isinstance(opened, PilBackend) and opened.size == {"height": SIDE, "width": SIDE}


def test_what_works_on_pil_or_is_a_tokenizer_stays() -> None:
    for processor in (make_image_processor(), make_tokenizer()):
        assert on_pil(processor) is processor


def test_a_processor_of_torchvision_alone_is_refused() -> None:
    class UnheardOfImageProcessor(ViTImageProcessor):
        pass

    with pytest.raises(ModelError, match="UnheardOfImageProcessor works by torchvision alone"):
        on_pil(UnheardOfImageProcessor())


@pytest.mark.parametrize(("mode", "resized"), [("center", (15, 10)), ("squash", (10, 10))])
def test_pixels_of_timm_by_hand(mode: str, resized: tuple[int, int]) -> None:
    # floor(8 / 0.8) = 10 is the shorter side of 30 x 20, or both; of 15 x 10 the middle 8 x 8 begins at (3, 1)
    image = noise(30, 20)
    small = np.asarray(image.resize(resized, Image.Resampling.BICUBIC), dtype=np.float64)
    left, upper = (resized[0] - 8) // 2, (resized[1] - 8) // 2
    expected = (small[upper : upper + 8, left : left + 8] / 255 - np.array(MEAN)) / np.array(STD)
    data = {"input_size": (3, 8, 8), "crop_pct": 0.8, "crop_mode": mode, "mean": MEAN, "std": STD}
    timm: Any = TimmWrapperImageProcessor.__new__(TimmWrapperImageProcessor)
    timm.data_config = data | {"interpolation": "bicubic"}
    got = on_pil(timm)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"interpolation": "random"}, {"input_size": (3, 8, 9)}])
def test_what_timm_does_otherwise_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="has no form by PIL here"):
        processor_of_timm({"input_size": (3, 8, 8)} | change)
