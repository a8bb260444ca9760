"""Is the best really better than the second? An exact test on pairs, in plain Python."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

EXACT = 16  # 65,536 signs; above that they are drawn
DRAWS = 100_000


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the paired sign-flip permutation test (Fisher 1935, The Design of Experiments, section 21).

    Under the null hypothesis each difference could as well have had the other sign. p is the share of all ``2^n`` ways
    to set the signs whose mean lies as far from 0 as the one seen; with more than 16 pairs signs are drawn instead,
    and p is ``(1 + hits) / (1 + draws)``. The smallest p of n pairs is ``2^(1 - n)``: 0.25 for 3, 0.0039 for 9.

    >>> sign_flip([1.0, 1.0, 1.0])
    0.25
    """
    sizes = [abs(value) for value in differences]
    seen = abs(math.fsum(differences)) * (1 - 1e-9)  # so that rounding doesn't lose a tie
    if len(sizes) <= EXACT:
        signs = itertools.product((1, -1), repeat=len(sizes))
        totals = (math.fsum(size * one for size, one in zip(sizes, sign, strict=True)) for sign in signs)
        hits = sum(abs(total) >= seen for total in totals)
        return hits / (1 << len(sizes))
    drawn = random.Random(0)
    hits = sum(abs(sum(size * drawn.choice((1, -1)) for size in sizes)) >= seen for _ in range(DRAWS))
    return (1 + hits) / (1 + DRAWS)


@dataclass(frozen=True)
class Paired:
    """Two arms on the same pairs of condition and seed; ``differences`` are second minus best, in nats per token."""

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """How much lower the loss of the best is."""
        return math.fsum(self.differences) / len(self.differences)

    @property
    def wins(self) -> int:
        """In how many pairs the best is better."""
        return sum(value > 0 for value in self.differences)

    @property
    def p(self) -> float:
        """Of :func:`sign_flip`."""
        return sign_flip(self.differences)
