"""How many ranks and channels each part of the blocks keeps, so that all together meet a budget in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from offsite_fl.emulators.budget import largest_share
from offsite_fl.emulators.parts import Part

Counts = dict[Part, int]


def count_at(part: Part, share: float) -> int:
    """Candidates that stay at a share of the part's numbers.

    ``max(1, round(share * m * n / (m + n)))`` directions of an ``m x n`` matrix, ``ceil(share * width)`` channels.
    """
    exact = part.exact(share)
    return min(part.candidates, max(1, math.ceil(exact) if part.in_mlp else round(exact)))


def held_bytes(counts: Mapping[Part, int]) -> int:
    """Bytes of all parts at these counts."""
    return sum(part.held(count) for part, count in counts.items())


def even_counts(
    parts: Sequence[Part], budget: int | None, keep_mha: float | None = None, keep_mlp: float | None = None
) -> Counts:
    """The same share of every part, the largest at which all together hold at most ``budget`` bytes.

    ``keep_mha`` and ``keep_mlp`` fix the share of matrices and of MLPs; the others share what this leaves. Bytes that
    whole ranks and channels leave over go to further ones, those that rounding took most from first.
    """
    fixed = {True: keep_mlp, False: keep_mha}
    counts: Counts = {p: count_at(p, share) for p in parts if (share := fixed[p.in_mlp]) is not None}
    free = [part for part in parts if part not in counts]
    if not free:
        return counts
    assert budget is not None
    left = budget - held_bytes(counts)

    def at(share: float) -> Counts:
        return {part: count_at(part, share) for part in free}

    share = largest_share(lambda share: held_bytes(at(share)), left)
    return counts | _filled(at(share), share, left)


def _filled(counts: Counts, share: float, budget: int) -> Counts:
    """One candidate more for every part as long as bytes are left."""
    filled, left = dict(counts), budget - held_bytes(counts)
    for part in sorted(counts, key=lambda p: counts[p] - p.exact(share)):
        step = part.held(counts[part] + 1) - part.held(counts[part])
        if step <= left and counts[part] < part.candidates:
            filled[part], left = counts[part] + 1, left - step
    return filled


def counts_by_score(counts: Counts, scores: Mapping[Part, Tensor], always: Mapping[Part, int]) -> Counts:
    """The bytes of ``counts`` given to the candidates of highest score a byte, whichever part they are in.

    Every part keeps one at least, and the first ``always`` of a part come before all others, as far as ``counts`` has
    so many.
    """
    chosen = {part: min(count, max(1, always[part])) for part, count in counts.items()}
    left = held_bytes(counts) - held_bytes(chosen)
    order: list[tuple[float, Part]] = []
    for part, taken in chosen.items():
        ranked = scores[part].double().cpu()
        ranked[: always[part]] = math.inf
        order += [(score / part.unit, part) for score in ranked.sort(descending=True).values[taken:].tolist()]
    for _, part in sorted(order, key=lambda entry: -entry[0]):
        step = part.held(chosen[part] + 1) - part.held(chosen[part])
        if step <= left:
            chosen[part], left = chosen[part] + 1, left - step
    return chosen
