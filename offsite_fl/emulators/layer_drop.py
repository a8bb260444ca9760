"""Uniform LayerDrop, the compression of the offsite-tuning paper (arXiv 2302.04870)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from offsite_fl.emulators.base import Context, Emulator, register
from offsite_fl.emulators.choice import BlockChoice
from offsite_fl.errors import EmulatorError

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
class LayerDrop(BlockChoice):
    """Keep evenly spaced blocks of the middle and drop the others.

    Uniform layer drop, the emulator compression of Offsite-Tuning (arXiv 2302.04870): of the ``M`` middle blocks the
    ``n`` kept ones are ``round(i * (M - 1) / (n - 1))``, ``i = 0..n-1``, a half to the even index, so the first and the
    last always stay (OPT-1.3B with two adapter blocks at each end keeps 8 of 20: 2, 5, 7, 10, 13, 16, 18, 21 of the
    model's). ``rounding=floor`` is that of FederatedScope and FedBiOT (arXiv 2406.17706).

    ``keep`` is a number of blocks (2 or more) or, below 1, the share of the middle's bytes that stays, of which the
    nearest number of whole blocks is kept. Kept blocks leave the owner's house verbatim.
    """

    rounding: Rounding = "round"

    least: ClassVar[int] = 2

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """Every so many places, the first and the last among them."""
        positions = emulator.positions
        return tuple(positions[i] for i in kept_indices(len(positions), count, self.rounding))
