"""AdamW or SGD over the trained tensors alone, without weight decay on biases and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offsite_fl.config import TuneConfig
from offsite_fl.models.head import is_head

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
    """The optimiser of ``config`` over ``trainable``; it holds no state for anything else of ``network``.

    Each group of parameters has a factor ``lr_scale`` of its own: ``config.head_lr_scale`` for the head, else 1.
    :func:`set_rate` applies it.
    """
    free = undecayed(network)
    parameters = list(trainable.values())
    groups = [
        {
            "params": [p for name, p in trainable.items() if is_head(name) == head and (id(p) in free) == kept],
            "weight_decay": 0.0 if kept else config.weight_decay,
            "lr_scale": config.head_lr_scale if head else 1.0,
        }
        for head in (False, True)
        for kept in (False, True)
    ]
    kinds: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    options: dict[str, Any] = {"lr": config.lr, "fused": all(p.device.type in _FUSED for p in parameters)}
    return kinds[config.optimizer]([group for group in groups if group["params"]], **options)


def set_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of every group to ``rate`` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
