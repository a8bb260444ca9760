"""The image processor of a timm model by PIL and NumPy: timm's own is a chain of torchvision's transforms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers.image_utils import PILImageResampling
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from offsite_fl.errors import ModelError

RESAMPLING = {
    "nearest": PILImageResampling.NEAREST,
    "bilinear": PILImageResampling.BILINEAR,
    "bicubic": PILImageResampling.BICUBIC,
    "lanczos": PILImageResampling.LANCZOS,
}


def processor_of_timm(data: Mapping[str, Any]) -> BitImageProcessorPil:
    """Resize, centre crop and normalize as timm's ``create_transform`` does for evaluation (timm 1.0).

    Parameters
    ----------
    data
        timm's data config, or a checkpoint's ``pretrained_cfg``: ``input_size`` (channels, height, width),
        ``interpolation``, ``crop_pct`` (side of the crop over that of the resized image), ``crop_mode``, ``mean`` and
        ``std`` of the channels. What is missing is timm's default. With the crop mode ``center`` the shorter side
        becomes floor(side / crop_pct), with ``squash`` both sides do; a crop of ``input_size`` follows.

    Raises
    ------
    ModelError
        If the crop mode or the interpolation is another one, or the input isn't square.
    """
    _, height, width = data.get("input_size") or (3, 224, 224)
    mode, interpolation = data.get("crop_mode") or "center", data.get("interpolation") or "bicubic"
    if mode not in ("center", "squash") or interpolation not in RESAMPLING or height != width:
        raise ModelError(
            f"timm's processor with crop_mode = {mode!r}, interpolation = {interpolation!r} and input_size = "
            f"{height} x {width} has no form by PIL here: crop_mode may be 'center' or 'squash', interpolation "
            f"{', '.join(RESAMPLING)}, and the input must be square; or give an image processor of transformers"
        )
    side = math.floor(height / (data.get("crop_pct") or 0.875))
    return BitImageProcessorPil(
        size={"shortest_edge": side} if mode == "center" else {"height": side, "width": side},
        crop_size={"height": height, "width": width},
        resample=RESAMPLING[interpolation],
        image_mean=list(data.get("mean") or IMAGENET_DEFAULT_MEAN),
        image_std=list(data.get("std") or IMAGENET_DEFAULT_STD),
    )
