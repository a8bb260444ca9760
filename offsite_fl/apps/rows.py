"""The five rows at the end of a federation."""

from __future__ import annotations

from offsite_fl.evaluation.rows import FiveRows, Row
from offsite_fl.measure import Measure
from offsite_fl.repair import Repair
from offsite_fl.strategies import OffsiteTuning


def five_rows(
    strategy: OffsiteTuning, measure: Measure, full_fine_tuning: Row | None, repair: Repair | None = None
) -> FiveRows:
    """The rows, from what was measured in round 0 and after the last round where that was done."""
    before, after, update = strategy.history[0], strategy.history[-1], strategy.update()
    plugged = after.plug_in if repair is None else None
    return FiveRows(
        # In round 0 nothing is tuned yet: the plug-in is the full model, and the emulator as it was handed out.
        before.plug_in or measure.full_zero_shot(),
        before.emulator or measure.emulator_zero_shot(),
        after.emulator or measure.emulator_tuned(update.tensors, update.lora),
        plugged or measure.plug_in(update.tensors, update.lora, repair),
        full_fine_tuning,
    )
