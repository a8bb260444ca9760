"""Which blocks to keep so that the adapter's gradients stay those on the full model, found by trying."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite_fl.config import check
from offsite_fl.emulators.base import Batch, Context, Emulator, register
from offsite_fl.emulators.block_trials import BlockTrials
from offsite_fl.emulators.choice import BlockChoice
from offsite_fl.emulators.elimination_state import Elimination, SavedElimination
from offsite_fl.emulators.streams import first_examples
from offsite_fl.emulators.training import training_bar
from offsite_fl.emulators.training_state import fingerprint

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
    of 26. ``pool=0`` tries all each time. With a ``workdir`` an interrupted search goes on at the block that was to be
    dropped next.
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
        text = first_examples(context.need_calibration(self.name), self.tokens)
        state, save = self._resume(emulator, count, context, text)
        if len(state.left(places)) == count:
            return tuple(state.left(places))
        trials = BlockTrials(emulator, context, text)
        tried = number_of_trials(len(places), len(state.left(places)), self.pool) if state.dropped else 0
        with training_bar(self.name, context, number_of_trials(len(places), count, self.pool), tried) as tell:

            def value(left: Sequence[int]) -> float:
                nonlocal tried
                cosine, tried = trials.cosine(left), tried + 1
                tell(tried, f"{len(left)} blocks, cosine {cosine:.3f}")
                return cosine

            kept, cosine = eliminate(places, count, value, self.pool, state, save)
        log.info("gradient-match: blocks %s stay, the adapter's gradients have cosine %.3f", kept, cosine)
        return kept

    def _resume(
        self, emulator: Emulator, count: int, context: Context, text: Sequence[Batch]
    ) -> tuple[Elimination, Callable[[Elimination], None]]:
        """How far the same search has come in the ``workdir``, and what keeps its state there."""
        if context.workdir is None:
            return Elimination(), lambda _: None
        saved = SavedElimination(context.workdir, fingerprint(str(self), emulator, context, text, ()), self.name)
        state = saved.load(emulator.positions, count)
        if state.dropped:
            log.info("gradient-match: going on with blocks %s dropped", state.dropped)
        return state, saved.save


def eliminate(
    places: Sequence[int],
    count: int,
    value: Callable[[Sequence[int]], float],
    pool: int = 0,
    state: Elimination | None = None,
    save: Callable[[Elimination], None] = lambda _: None,
) -> tuple[tuple[int, ...], float]:
    """Drop places one by one, each time the one without which ``value`` is highest, of equal ones the last.

    Args:
        places: to begin with, in order.
        count: how many are to be left, below their number.
        value: of some of the places, in order.
        pool: how many are tried each time after the first: those that cost least when last tried; 0 for all.
        state: where an earlier call with the same arguments was; it is moved on.
        save: called with the state after each drop.

    Returns:
        The places that are left, and their value.

    >>> eliminate((1, 2, 3), 1, lambda left: {(1, 2, 3): 9, (1, 2): 5, (1, 3): 7, (1,): 2, (3,): 4}.get(tuple(left), 0))
    ((3,), 4)
    """
    state = state or Elimination()
    left, costs = state.left(places), state.costs
    now = value(places) if state.value is None else state.value
    while len(left) > count:
        likely = sorted(left, key=lambda place: (costs.get(place, 0.0), -place))
        values = {}
        for place in likely[:pool] if pool and costs else likely:
            values[place] = value([other for other in left if other != place])
            costs[place] = now - values[place]
        dropped = max(values, key=lambda place: (values[place], place))
        left.remove(dropped)
        state.dropped.append(dropped)
        state.value = now = values[dropped]
        save(state)
    return tuple(left), now


def number_of_trials(places: int, count: int, pool: int) -> int:
    """How often :func:`eliminate` asks for a value.

    >>> number_of_trials(26, 13, 3), number_of_trials(26, 13, 0)
    (63, 261)
    """
    later = (min(pool or left, left) for left in range(places - 1, count, -1))
    return 1 + places + sum(later)
