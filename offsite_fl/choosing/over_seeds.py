"""Numbers of several seeds: their mean and deviation, and how people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OverSeeds:
    """Numbers of several seeds: mean and sample standard deviation (None for one seed).

    >>> OverSeeds.of([1.0, 3.0])
    OverSeeds(mean=2.0, std=1.4142135623730951, values=(1.0, 3.0))
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> OverSeeds:
        """Mean and deviation of at least one number."""
        given = tuple(values)
        mean = math.fsum(given) / len(given)
        if len(given) == 1:
            return cls(mean, None, given)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in given) / (len(given) - 1)), given)

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for one seed."""
        return None if self.std is None else self.std / math.sqrt(len(self.values))


def shown(given: OverSeeds | None) -> str:
    """A loss or cosine for people: ``3.553``, with several seeds ``3.553 ± 0.004``; nothing for None."""
    if given is None:
        return ""
    if not math.isfinite(given.mean):
        return "diverged"
    return f"{given.mean:.3f}" + ("" if given.std is None else f" ± {given.std:.3f}")


def rate(given: OverSeeds | None) -> str:
    """An accuracy for people: ``76.8%``, with several seeds ``76.8% ± 0.6``."""
    return "" if given is None else f"{100 * given.mean:.1f}%" + _points_of(given.std)


def points(given: OverSeeds | None) -> str:
    """A difference of accuracies in percentage points: ``5.2``, with several seeds ``5.2 ± 0.6``."""
    return "" if given is None else f"{100 * given.mean:.1f}" + _points_of(given.std)


def _points_of(std: float | None) -> str:
    return "" if std is None else f" ± {100 * std:.1f}"


def percent(given: OverSeeds | None) -> str:
    """A share for people: ``55%``, with several seeds ``55% ± 3``."""
    if given is None or not math.isfinite(given.mean):
        return ""
    return f"{given.mean:.0%}" + ("" if given.std is None else f" ± {100 * given.std:.0f}")


def part(share: float | None) -> str:
    """A share without seeds."""
    return "" if share is None else f"{share:.0%}"


def csv_head(names: Iterable[str]) -> list[str]:
    """Two columns for each name.

    >>> csv_head(["gap"])
    ['gap', 'gap_std']
    """
    return [column for name in names for column in (name, f"{name}_std")]


def csv_cells(holder: object, names: Iterable[str]) -> dict[str, object]:
    """What stands in the columns of :func:`csv_head`: mean and deviation of the attributes that are there."""
    line: dict[str, object] = {}
    for name in names:
        given: OverSeeds | None = getattr(holder, name)
        if given is not None:
            line |= {name: given.mean, f"{name}_std": "" if given.std is None else given.std}
    return line
