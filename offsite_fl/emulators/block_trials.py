"""What becomes of the adapter's gradients if only some of an emulator's blocks run: one network for all tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.gradients import full_gradients, match_gradients, network_gradients
from offsite_fl.emulators.report import planned_network
from offsite_fl.emulators.streams import working_copy
from offsite_fl.emulators.watching import Watcher
from offsite_fl.errors import EmulatorError
from offsite_fl.models.network import place_blocks


class BlockTrials:
    """The client's network of ``emulator``, any of whose places can be left out, on ``batches`` of public text.

    ``EmulatorError`` if the full model's adapter gradients on them are zero or not finite.
    """

    def __init__(self, emulator: Emulator, context: Context, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._full = full_gradients(context, batches)
        size = sum(float(gradient.double().square().sum()) for gradient in self._full.values())
        if not 0 < size < math.inf:
            raise EmulatorError(
                "the adapter's gradients on the calibration text are zero or not finite, so none can be compared with "
                "them: give text of two tokens or more an example, or load the model in float32"
            )
        self._network, self._plan = planned_network(emulator, context)
        blocks = place_blocks(self._network, self._plan)
        order = sorted([*context.adapter, *emulator.positions])
        self._blocks = {position: blocks[order.index(position)] for position in emulator.positions}
        some = context.middle[0]
        self._returns = Watcher(context).returns(working_copy(context.block(some), context.device), some)

    def cosine(self, places: Collection[int]) -> float:
        """Cosine of all adapter gradients with the full model's if only ``places`` run; -1 if they aren't finite."""
        skipped = [block for position, block in self._blocks.items() if position not in places]
        with _skipping(skipped, self._returns):
            ours = network_gradients(self._network, self._plan, self._batches)
        cosine = match_gradients(ours, self._full).cosine
        return cosine if math.isfinite(cosine) else -1.0


@contextmanager
def _skipping(blocks: Sequence[nn.Module], returns: int) -> Iterator[None]:
    """``blocks`` hand on their input, alone or as the first of ``returns`` items, within a ``with`` block."""
    hand_on = _handing_on(returns)
    for block in blocks:
        block.forward = hand_on
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _handing_on(returns: int) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * (returns - 1)) if returns else hidden_states

    return forward
