"""How the emulator is aligned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from offsite_fl.config import LoraOptions, TuneConfig, check, check_choices

Hidden = Literal["normalised", "cosine", "layerwise"]


@dataclass(frozen=True)
class AlignmentOptions:
    """Loss, optimiser and factors of an alignment, see :class:`~offsite_fl.alignment.Aligner`.

    ``hidden`` is the error of the hidden state: "normalised" (squared, in units of the full model's mean square) or
    "cosine" (one minus the mean cosine) behind the emulator, or "layerwise", the sum of the first behind each of the
    emulator's blocks. ``lambda_kl`` weighs the divergence of the outputs, at ``kl_temperature``, against it; at 0 no
    output is computed. ``targets`` are names of linears in the emulator's blocks, none meaning all of them. ``seed``
    draws the first factors and the order of the public examples. A step is one batch.
    """

    lambda_kl: float = 0.9
    kl_temperature: float = 1.0
    hidden: Hidden = "normalised"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    lr: float = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch_size: int = 4
    block_size: int = 128
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("lambda_kl", "clip_norm"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"alignment: {name} must be a number from 0, got {value}")
        warm = 0 < self.kl_temperature < math.inf
        check(warm, f"alignment: kl_temperature must be a number above 0, got {self.kl_temperature}")
        _ = self.lora, self.tuning  # the rest is checked there

    @property
    def lora(self) -> LoraOptions:
        """The factors."""
        return LoraOptions(self.rank, self.alpha, 0.0, self.targets)

    @property
    def tuning(self) -> TuneConfig:
        """What the optimiser and the batches are made from."""
        return TuneConfig(
            lr=self.lr,
            optimizer=self.optimizer,
            batch_size=self.batch_size,
            block_size=self.block_size,
            seed=self.seed,
        )
