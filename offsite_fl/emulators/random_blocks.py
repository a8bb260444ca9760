"""Random blocks: the control that every choice of blocks has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, register
from offsite_fl.emulators.choice import BlockChoice


@register("random")
@dataclass(frozen=True)
class RandomBlocks(BlockChoice):
    """Keep blocks of the middle drawn at random; a control.

    ``keep`` is a number of blocks (1 or more) or, below 1, the share of the bytes that stays. ``seed`` decides the
    draw; without one it is the seed of the whole build. Kept blocks leave the owner's house verbatim.
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.seed is None or 0 <= self.seed < 2**63
        check(fits, f"random seed must be 0 or above and fit 64 bits, got {self.seed}")

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """``count`` places, each set of that size as likely as any other."""
        generator = torch.Generator().manual_seed(context.seed if self.seed is None else self.seed)
        drawn = torch.randperm(len(emulator.positions), generator=generator)[:count].tolist()
        return tuple(emulator.positions[i] for i in sorted(drawn))
