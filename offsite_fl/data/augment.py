"""Random crops and flips of images, from PIL alone, each drawn from a seed, the epoch and the image's row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image as Pil

from offsite_fl.config import Augment
from offsite_fl.data.images import ImageTransform
from offsite_fl.errors import ConfigError

# Inception's crop (arXiv 1409.4842, section 6), with the numbers that torchvision's RandomResizedCrop made usual.
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


def augmented(image: Pil.Image, transform: ImageTransform, kind: Augment, seed: int, epoch: int, row: int) -> Any:
    """Pixels [C, H, W] fp32 of ``image`` as training sees them: ``kind`` "none", "flip", or "crop-flip".

    "flip" mirrors half of the images; "crop-flip" first takes a crop of 8 to 100 % of the area with sides from 3:4 to
    4:3 and brings it to the model's size. The same seed, epoch and row give the same pixels, whatever ran before.
    ``ConfigError`` where a crop has no size to be brought to.
    """
    if kind == "none":
        return transform.pixels(image)
    draw = np.random.default_rng([seed % 2**63, epoch, row])
    options: dict[str, Any] = {}
    if kind == "crop-flip":
        height, width = final_size(transform.processor)
        image = image.resize((width, height), Pil.Resampling.BICUBIC, box=random_box(image.width, image.height, draw))
        options = {"do_resize": False}
        if hasattr(transform.processor, "do_center_crop"):
            options["do_center_crop"] = False
    if draw.random() < 0.5:
        image = image.transpose(Pil.Transpose.FLIP_LEFT_RIGHT)
    return transform.pixels(image, **options)


def random_box(width: int, height: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """A crop (left, upper, right, lower) in pixels; where none fits in ten tries, the largest one in the middle."""
    for _ in range(TRIES):
        area = width * height * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w = max(1, min(width, round(height * RATIO[1])))
    h = max(1, min(height, round(width / RATIO[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def final_size(processor: Any) -> tuple[int, int]:
    """Height and width of what ``processor`` makes of every image; ``ConfigError`` if that depends on the image."""
    cropped = getattr(processor, "do_center_crop", False)
    size = dict(getattr(processor, "crop_size" if cropped else "size", None) or {})
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    raise ConfigError(
        f"augment = 'crop-flip' needs an image processor that makes images of one size; {type(processor).__name__} "
        f"has {size}: use augment = 'flip', or give it a size of height and width"
    )
