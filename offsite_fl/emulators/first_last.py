"""The first or the last blocks of the middle: controls that ask whether the choice of blocks matters at all."""

from __future__ import annotations

from dataclasses import dataclass

from offsite_fl.emulators.base import Context, Emulator, register
from offsite_fl.emulators.choice import BlockChoice


@register("first")
@dataclass(frozen=True)
class FirstBlocks(BlockChoice):
    """Keep the first blocks of the middle; a control.

    ``keep`` is a number of blocks (1 or more) or, below 1, the share of the bytes that stays. Kept blocks leave the
    owner's house verbatim.
    """

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """The first ``count`` places."""
        return emulator.positions[:count]


@register("last")
@dataclass(frozen=True)
class LastBlocks(BlockChoice):
    """Keep the last blocks of the middle; a control.

    ``keep`` is a number of blocks (1 or more) or, below 1, the share of the bytes that stays. Kept blocks leave the
    owner's house verbatim.
    """

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """The last ``count`` places."""
        return emulator.positions[len(emulator.positions) - count :]
