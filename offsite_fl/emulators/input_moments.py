"""Second moments of what the linears of an emulator's blocks read while the full model runs on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.factor import gram
from offsite_fl.emulators.groups import plan_block, run_tapped
from offsite_fl.emulators.streams import Stream, read_batches, working_copy
from offsite_fl.errors import EmulatorError


def input_moments(
    emulator: Emulator,
    context: Context,
    batches: tuple[Batch, ...],
    what: str,
    wanted: Callable[[str], bool] = lambda _: True,
) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """By block of ``emulator``, in forward order, ``E[x x']`` [in, in] fp64 of each dense linear's input x by path.

    x is what the linear reads in the emulator's block on the hidden states of the full model, padding left out.
    Linears that read the same tensor share theirs; one that runs never or several times has none. A block that runs at
    several places is looked at in the first. ``what`` names the work on the progress bar. What no ``wanted`` linear
    reads is left alone. ``EmulatorError`` if an input isn't finite.
    """
    stream = Stream.entering(read_batches(context, batches))
    seen: set[int] = set()
    end = max(emulator.positions)
    for position in context.track(range(end + 1), what, total=end + 1):
        slot = emulator.layout.get(position)
        if slot is not None and slot not in seen:
            seen.add(slot)
            yield slot, _of_block(working_copy(emulator.blocks[slot].module, context.device), stream, position, wanted)
        if position < end:
            stream = stream.through(working_copy(context.block(position), context.device), position)


def _of_block(block: nn.Module, stream: Stream, position: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    first = stream.batches[0]
    plan = plan_block(block, stream.hidden[0], first.calls[position], first.rows)
    groups = [group for group in plan.groups if any(map(wanted, group))]
    if not groups:
        return {}
    sums: dict[str, Tensor] = {}
    tokens = 0
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        heads = [group[0] for group in groups]
        taps = run_tapped(block, hidden, batch.calls[position], inputs=heads, partial=True)
        rows = {head: batch.rows(taps.inputs[head]).float() for head in heads}
        sums = {head: gram(x) + sums[head] if sums else gram(x) for head, x in rows.items()}
        tokens += len(next(iter(rows.values())))
    for head, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise EmulatorError(
                f"the inputs of {head} in block {position} aren't finite on the calibration text; is the model's "
                "dtype fp16?"
            )
        total /= tokens
    return {path: sums[group[0]] for group in groups for path in group}
