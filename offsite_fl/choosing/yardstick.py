"""The numbers that candidates are judged in: of text the loss, of classes the accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from offsite_fl.choosing.over_seeds import OverSeeds, points, rate, shown
from offsite_fl.choosing.results import Numbers, Tuned


@dataclass(frozen=True)
class Yardstick:
    """A number of a tuned network on the test data.

    ``read`` takes it from what was measured, ``more_is`` is 1 where more is worse and -1 where it is better. No
    difference up to ``clear`` counts. ``level`` and ``step`` say a number and a difference to people, in units of
    ``unit`` and ``step_unit``.
    """

    name: str
    read: Callable[[Tuned], Numbers | None]
    more_is: int
    clear: float
    level: Callable[[OverSeeds | None], str]
    step: Callable[[OverSeeds | None], str]
    unit: str
    step_unit: str

    def behind(self, one: float, other: float) -> float:
        """By how much ``one`` is worse than ``other``."""
        return self.more_is * (one - other)

    def told(self, value: float) -> str:
        """One number for people."""
        return self.level(OverSeeds.of([value]))

    def told_step(self, value: float) -> str:
        """One difference for people."""
        return self.step(OverSeeds.of([value]))


# What seeds usually make of a loss; with several of them a gap must be larger than their standard errors too.
CLEAR_NATS = 0.02
# Two standard errors of an accuracy of one half on 400 examples.
CLEAR_SHARE = 0.05

LOSS = Yardstick("loss", lambda tuned: tuned.losses, 1, CLEAR_NATS, shown, shown, "nats per token", "nats")
LOSS_OF_CLASSES = replace(LOSS, unit="nats per example")
ACCURACY = Yardstick("accuracy", lambda tuned: tuned.accuracy, -1, CLEAR_SHARE, rate, points, "right", "points")
