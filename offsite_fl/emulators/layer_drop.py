"""Uniform LayerDrop, the compression of the offsite-tuning paper (arXiv 2302.04870)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offsite_fl.emulators.base import Context, Emulator, EmulatorMethod, register
from offsite_fl.errors import ConfigError, EmulatorError

Rounding = Literal["round", "floor"]


def kept_indices(total: int, keep: int, rounding: Rounding = "round") -> tuple[int, ...]:
    """Which ``keep`` of ``total`` middle blocks stay: ``i * (total - 1) / (keep - 1)`` for i = 0..keep-1, rounded.

    The first and the last always stay. ``round`` is half-to-even, as the paper's code and FATE-LLM do it; ``floor`` is
    FederatedScope's and FedBiOT's. Integers only: floored floats can land one short. ``EmulatorError`` unless
    ``2 <= keep <= total`` (one block divides by zero, too many would repeat blocks).

    >>> kept_indices(20, 8)
    (0, 3, 5, 8, 11, 14, 16, 19)
    """
    if not 2 <= keep <= total:
        raise EmulatorError(
            f"layer-drop can't keep {keep} of {total} middle blocks: keep must lie between 2 and {total}"
        )
    kept = []
    for i in range(keep):
        index, rest = divmod(i * (total - 1), keep - 1)
        if rounding == "round":
            twice = 2 * rest
            index += twice > keep - 1 or (twice == keep - 1 and index % 2 == 1)
        kept.append(index)
    return tuple(kept)


@register("layer-drop")
@dataclass(frozen=True)
class LayerDrop(EmulatorMethod):
    """Keep evenly spaced blocks of the middle and drop the others.

    ``keep`` is a number of blocks (2 or more) or, below 1, the share of the middle's blocks that stays, of which
    ``round(share * blocks)`` is kept. Kept blocks leave the owner's house verbatim.
    """

    keep: float
    rounding: Rounding = "round"

    def __post_init__(self) -> None:
        fits = 0 < self.keep < 1 or (self.keep >= 2 and self.keep == int(self.keep))
        if not fits:
            raise ConfigError(
                f"layer-drop keep = {self.keep!r} must be a number of blocks (2 or more) or a share between 0 and 1"
            )
        if self.keep >= 2:
            object.__setattr__(self, "keep", int(self.keep))

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Drop places of ``emulator``; the blocks that stay are the same modules."""
        positions = emulator.positions
        count = round(self.keep * len(positions)) if self.keep < 1 else int(self.keep)
        kept = [positions[i] for i in kept_indices(len(positions), count, self.rounding)]
        used = sorted({emulator.layout[position] for position in kept})
        slots = {old: new for new, old in enumerate(used)}
        return Emulator([emulator.blocks[old] for old in used], {p: slots[emulator.layout[p]] for p in kept})
