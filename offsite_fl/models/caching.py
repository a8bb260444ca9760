"""Whether a model keeps keys and values from token to token, which nothing here wants, and how it is told not to."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig


def has_cache(config: object) -> bool:
    """Whether models of ``config`` may have a cache; True for what isn't a config of transformers."""
    return not isinstance(config, PretrainedConfig) or hasattr(config.get_text_config(decoder=True), "use_cache")


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The argument of a forward pass without a cache; empty for a model without one (timm's take no such argument)."""
    return {"use_cache": False} if has_cache(getattr(model, "config", None)) else {}
