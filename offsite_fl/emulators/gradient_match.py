"""Which blocks to keep so that the adapter's gradients stay those on the full model, found by trying."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, register
from offsite_fl.emulators.block_trials import BlockTrials
from offsite_fl.emulators.choice import BlockChoice
from offsite_fl.emulators.streams import first_examples
from offsite_fl.emulators.training import training_bar

log = logging.getLogger(__name__)


@register("gradient-match")
@dataclass(frozen=True)
class GradientMatching(BlockChoice):
    """Drop, one by one, the blocks without which the adapter's gradients turn least.

    Ours and no paper's. Beginning with all blocks, that one goes without which the cosine between the adapter's
    gradients on the emulator and on the full model is highest, over all adapter tensors together, until ``keep`` are
    left: a number of blocks (1 or more) or, below 1, the share of the bytes that stays. Of equal ones the last goes.
    Kept blocks leave the owner's house verbatim.

    Gradients are those of the first calibration examples that together hold at most ``tokens`` tokens. Trying one block
    takes a forward and a backward pass over them, and trying all each time takes ``n + (n - 1) + ... + (m + 1)`` passes
    from n blocks to m. So all are tried once, and from then on the ``pool`` that look best: whose absence cost the
    cosine least when they were last tried. That is at most ``n + (n - m - 1) * pool`` passes: 62 instead of 260 for 13
    of 26. ``pool=0`` tries all each time.
    """

    tokens: int = 512
    pool: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.tokens >= 2, f"gradient-match tokens = {self.tokens} must be at least 2: one predicts the other")
        check(self.pool >= 0, f"gradient-match pool = {self.pool} can't be negative; 0 tries every block each time")

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """The ``count`` places that are left."""
        places = emulator.positions
        if count == len(places):
            return places  # nothing to compare, so no text is needed
        trials = BlockTrials(emulator, context, first_examples(context.need_calibration(self.name), self.tokens))
        tried = 0
        with training_bar(self.name, context, number_of_trials(len(places), count, self.pool)) as tell:

            def value(left: Sequence[int]) -> float:
                nonlocal tried
                cosine, tried = trials.cosine(left), tried + 1
                tell(tried, f"{len(left)} blocks, cosine {cosine:.3f}")
                return cosine

            kept, cosine = eliminate(places, count, value, self.pool)
        log.info("gradient-match: blocks %s stay, the adapter's gradients have cosine %.3f", kept, cosine)
        return kept


def eliminate(
    places: Sequence[int], count: int, value: Callable[[Sequence[int]], float], pool: int = 0
) -> tuple[tuple[int, ...], float]:
    """Drop places one by one, each time the one without which ``value`` is highest, of equal ones the last.

    Args:
        places: to begin with, in order.
        count: how many are to be left, below their number.
        value: of some of the places, in order.
        pool: how many are tried each time after the first: those that cost least when last tried; 0 for all.

    Returns:
        The places that are left, and their value.

    >>> eliminate((1, 2, 3), 1, lambda left: {(1, 2, 3): 9, (1, 2): 5, (1, 3): 7, (1,): 2, (3,): 4}.get(tuple(left), 0))
    ((3,), 4)
    """
    left, now = list(places), value(places)
    costs: dict[int, float] = {}
    while len(left) > count:
        likely = sorted(left, key=lambda place: (costs.get(place, 0.0), -place))
        values = {}
        for place in likely[:pool] if pool and costs else likely:
            values[place] = value([other for other in left if other != place])
            costs[place] = now - values[place]
        dropped = max(values, key=lambda place: (values[place], place))
        left.remove(dropped)
        now = values[dropped]
    return tuple(left), now


def number_of_trials(places: int, count: int, pool: int) -> int:
    """How often :func:`eliminate` asks for a value.

    >>> number_of_trials(26, 13, 3), number_of_trials(26, 13, 0)
    (63, 261)
    """
    later = (min(pool or left, left) for left in range(places - 1, count, -1))
    return 1 + places + sum(later)
