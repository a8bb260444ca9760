"""How far a site says that it went: for strategies that divide by it, what may be said.

A claim can't be checked, but it can be held against those of the others. A work that is too small makes the site's
direction, which is divided by it, longer than any bound on updates sees; one that is too large makes everybody else's
longer, because FedNova's step has the length of the mean work.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp.strategy import Strategy

from offsite_fl.config import check
from offsite_fl.errors import WireError

from .snapshot import nested_of

LR_SUM, STEPS = "lr_sum", "steps"
DEFAULT_FACTOR = 10.0


class OfWork:
    """A strategy that divides by the work of each reply.

    ``work_keys``: metrics that tell it; the first that all replies have counts. ``work_factor``: how many times the
    round's median work, or what part of it, a reply's may be.
    """

    work_keys: ClassVar[tuple[str, ...]]
    work_factor: float


@dataclass(frozen=True)
class Work:
    """The bound on what replies may say of their work."""

    keys: tuple[str, ...]
    factor: float = DEFAULT_FACTOR

    def __post_init__(self) -> None:
        check(1 <= self.factor < float("inf"), f"work-factor must be a finite number from 1, got {self.factor}")

    @classmethod
    def of(cls, base: Strategy) -> Work | None:
        """The bound of the first strategy in ``base``, alone or inside a wrapper, that has one."""
        found = next(iter(nested_of(base, OfWork)), None)
        return None if found is None else cls(found.work_keys, found.work_factor)

    def check(self, metrics: Mapping[str, object]) -> None:
        """``WireError`` if one reply, whose metrics are finite numbers, tells no work or none above 0."""
        told = [key for key in self.keys if key in metrics]
        if not told:
            raise WireError(f"tells no work: the strategy needs the metric {' or '.join(map(repr, self.keys))}")
        for key in told:
            if not metrics[key] > 0:  # type: ignore[operator]
                raise WireError(f"the metric {key!r} is {metrics[key]}, a work must be above 0")

    def odd(self, metrics: Mapping[int, Mapping[str, float]]) -> dict[int, str]:
        """Those of the replies ``metrics`` whose work is too far from the others', by node with the reason.

        Of two that are too far from each other nobody can say which one is the odd one, so both are. One alone passes:
        there is nothing to hold it against, and FedNova doesn't divide by it.
        """
        key = next((key for key in self.keys if all(key in told for told in metrics.values())), None)
        if key is None or len(metrics) < 2:
            return {}
        work = {node: told[key] for node, told in metrics.items()}
        if len(work) == 2:
            least, most = sorted(work.values())
            if most <= self.factor * least:
                return {}
            return dict.fromkeys(
                work, f"{key} is {least:.4g} and {most:.4g} in the round's two replies, more than {self.factor:g} times"
            )
        median = statistics.median(work.values())
        return {
            node: f"{key} is {each:.4g}, the bound is {self.factor:g} times the round's median {median:.4g}, up or down"
            for node, each in work.items()
            if not median <= self.factor * each or not each <= self.factor * median
        }
