"""A small network in place of a whole block: what ScaleOT (arXiv 2412.09812) calls a harmonizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

PLAIN = (bool, int, float, str, type(None))


class Harmonizer(nn.Module):
    """``x + Up(ReLU(Down x))``: a block of ``2 * features * rank`` weights and two biases.

    It is called as the block was and returns what the block returned: with ``returns = 0`` the hidden state itself,
    else a tuple of that many items whose first is the state and whose others are None (BLOOM's blocks return two). A
    fresh one has ``Up = 0`` and so hands its input on.
    """

    layer_idx: int | None = None
    """Where the block stood, which is where a key-value cache counts its tokens; None if it never said."""

    def __init__(self, features: int, rank: int, returns: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.features, self.rank, self.returns = features, rank, returns
        self.down: nn.Module = nn.Linear(features, rank, device=device)
        up = nn.Linear(rank, features, device=device)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.up: nn.Module = up

    @classmethod
    def replacing(
        cls, block: nn.Module, features: int, rank: int, returns: int = 0, device: torch.device | str | None = None
    ) -> Harmonizer:
        """A fresh one for the place of ``block``, with the plain attributes that a model may read from its blocks."""
        new = cls(features, rank, returns, device)
        for name, value in vars(block).items():
            if not name.startswith("_") and isinstance(value, PLAIN) and not hasattr(new, name):
                setattr(new, name, value)
        places = (vars(module).get("layer_idx") for module in block.modules())
        new.layer_idx = next((place for place in places if isinstance(place, int)), None)
        return new.train(block.training)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[Any, ...]:
        """Map [B, T, features] to the same; whatever else a block is called with counts for nothing."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                self._count(value, hidden_states)
        update: torch.Tensor = self.up(torch.relu(self.down(hidden_states)))
        state = hidden_states + update.to(hidden_states.dtype)
        return (state, *[None] * (self.returns - 1)) if self.returns else state

    def _count(self, cache: Cache, hidden: torch.Tensor) -> None:
        """Leave one empty number a token in the cache: a model reads the length so far off its first blocks."""
        if self.layer_idx is not None:
            empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(empty, empty, self.layer_idx)
