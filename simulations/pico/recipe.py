"""What the small model is and how it is trained. Everything that changes the result is here, so it names the result."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass

from offsite_fl.config import check


@dataclass(frozen=True)
class Recipe:
    """Size and training of the small model. The budget is steps, not seconds: load on the machine changes nothing.

    ``stages`` are (blocks, optimiser steps). The first stage trains a shallow model, each later one begins with the one
    before grown (:func:`~simulations.pico.pretrain.grow`), by default first every block doubled and then two new ones
    at each end: a deep model trained from nothing learns little more than word counts in so short a time, and its
    middle blocks nothing at all. The vocabulary is small so that words must be put together from pieces, which needs
    the middle.
    """

    hidden: int = 128
    mlp: int = 384
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 512
    positions: int = 512
    stages: tuple[tuple[int, int], ...] = ((4, 400), (8, 200), (12, 200))
    block_size: int = 128
    batch_size: int = 4
    lr: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        depths = [depth for depth, _ in self.stages]
        check(bool(depths) and min(depths) >= 1, f"stages need at least one block each, got {self.stages}")
        pairs = list(itertools.pairwise(depths))
        grows = all(after % before == 0 or (after > before and (after - before) % 2 == 0) for before, after in pairs)
        check(grows, f"each stage's blocks must be a multiple of those before, or an even number more, got {depths}")
        check(min(steps for _, steps in self.stages) >= 1, f"every stage needs a step, got {self.stages}")
        check(self.hidden % self.heads == 0, f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        check(self.heads % self.kv_heads == 0, f"heads ({self.heads}) must be a multiple of kv-heads ({self.kv_heads})")

    @property
    def depth(self) -> int:
        """Number of blocks of the finished model."""
        return self.stages[-1][0]

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages together."""
        return sum(steps for _, steps in self.stages)

    def digest(self, text: str) -> str:
        """SHA-256 of this recipe and the text it is used on."""
        fields = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(f"{fields}\n{hashlib.sha256(text.encode()).hexdigest()}".encode()).hexdigest()
