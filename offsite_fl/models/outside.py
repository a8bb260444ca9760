"""What a model holds outside its blocks: embeddings, norms, heads, an encoder in front, a vision tower."""

from __future__ import annotations

import torch
from torch import nn


def outside_blocks(model: nn.Module, blocks_path: str) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once, under their first name) and persistent buffers that aren't in the blocks."""
    inside = blocks_path + "."
    kept = set(model.state_dict())
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if name in kept and not name.startswith(inside)}
