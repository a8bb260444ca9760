"""AdamW or SGD over the trained tensors alone, without weight decay on biases and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offsite_fl.config import TuneConfig

_FUSED = {"cpu", "cuda"}


def undecayed(network: nn.Module) -> set[int]:
    """``id`` of every parameter that is a bias or belongs to a norm, told by the type of its module.

    By type and not by name, since families call their norms ``ln_1``, ``input_layernorm``, ``layer_norm``...
    """
    return {
        id(parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("bias") or "norm" in type(module).__name__.lower()
    }


def make_optimizer(
    network: nn.Module, trainable: Mapping[str, nn.Parameter], config: TuneConfig
) -> torch.optim.Optimizer:
    """The optimiser of ``config`` over ``trainable``; it holds no state for anything else of ``network``."""
    free = undecayed(network)
    parameters = list(trainable.values())
    groups = [
        {"params": [p for p in parameters if id(p) not in free], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) in free], "weight_decay": 0.0},
    ]
    kinds: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    options: dict[str, Any] = {"lr": config.lr, "fused": all(p.device.type in _FUSED for p in parameters)}
    return kinds[config.optimizer]([group for group in groups if group["params"]], **options)
