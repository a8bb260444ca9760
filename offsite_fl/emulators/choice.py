"""Emulators made of some of the middle's blocks as they are; a method of this kind only says which."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator
from offsite_fl.emulators.budget import BudgetedMethod, emulator_bytes
from offsite_fl.errors import EmulatorError


@dataclass(frozen=True)
class BlockChoice(BudgetedMethod):
    """Keep some blocks of the middle and drop the others.

    ``keep`` is a number of blocks (1 or more) or, below 1, the share of the bytes that stays. Kept blocks leave the
    owner's house verbatim.
    """

    grain: ClassVar[str] = "blocks are kept whole"
    least: ClassVar[int] = 1
    """The smallest number of blocks that the method can keep."""

    def __post_init__(self) -> None:
        fits = 0 < self.keep < 1 or (self.keep >= self.least and self.keep == int(self.keep))
        check(
            fits,
            f"{self.name} keep = {self.keep!r} must be a number of blocks ({self.least} or more) or a share between "
            "0 and 1",
        )
        if self.keep >= 1:
            object.__setattr__(self, "keep", int(self.keep))
        self._check_bytes()

    def budget(self, emulator: Emulator) -> int | None:
        """Bytes of the share that was asked for; None for a number of blocks."""
        return None if self.keep >= 1 and not self.bytes else super().budget(emulator)

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Drop places of ``emulator``; the blocks that stay are the same modules."""
        places = len(emulator.positions)
        count = int(self.keep) if budget is None else round(places * budget / emulator_bytes(emulator))
        if not self.least <= count <= places:
            raise EmulatorError(
                f"{self.name} can't keep {count} of {places} middle blocks: keep must lie between {self.least} and "
                f"{places}"
            )
        return keep_places(emulator, self.choose(emulator, count, context))

    @abstractmethod
    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """The ``count`` positions of ``emulator`` that stay."""


def keep_places(emulator: Emulator, positions: Iterable[int]) -> Emulator:
    """``emulator`` without the places that aren't among ``positions``, and without the blocks that ran only there."""
    kept = sorted(positions)
    used = sorted({emulator.layout[position] for position in kept})
    slots = {old: new for new, old in enumerate(used)}
    return Emulator([emulator.blocks[old] for old in used], {p: slots[emulator.layout[p]] for p in kept})
