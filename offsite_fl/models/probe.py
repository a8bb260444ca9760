"""The smallest batch that a model's forward pass takes, told by its config: text, an image, sound, or text and text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def probe_batch(model: nn.Module, length: int = 4, rows: int = 1) -> dict[str, Tensor]:
    """``rows`` of zeros on the model's device: ``length`` tokens, or an image or sound of the size it is made for.

    An encoder beside a decoder gets different tokens. Keys are the names that the forward pass knows: the model's
    ``main_input_name``, and ``decoder_input_ids`` where there is an encoder and a decoder.
    """
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "input_ids")
    device = next(model.parameters()).device
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
    batch = {name: tokens}
    if name == "pixel_values":
        batch[name] = torch.zeros(rows, int(getattr(config, "num_channels", 3)), *_image_size(model), device=device)
    elif name == "input_features":
        frames = 2 * int(getattr(config, "max_source_positions", length))
        batch[name] = torch.zeros(rows, int(getattr(config, "num_mel_bins", 80)), frames, device=device)
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens
        if name == "input_ids":
            # Every token another: attention over equal ones returns what it reads and looks like no attention at all.
            row = torch.arange(length, device=device) % int(getattr(config, "vocab_size", length))
            batch[name] = row.repeat(rows, 1)
    return batch


def _image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width by the config, else by the module that cuts images into patches (timm's), else 224."""
    said = (getattr(part, "img_size", None) for part in model.modules())
    size: Any = getattr(getattr(model, "config", None), "image_size", None) or next(filter(None, said), 224)
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)
