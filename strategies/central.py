"""Evaluation on the server: what the adapter is worth in the full model and in the emulator, round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from flwr.app import ArrayRecord, MetricRecord

from offsite_fl.config import LoraOptions
from offsite_fl.evaluation.rows import Row
from offsite_fl.patch import Patch

PLUG_IN_LOSS, EMULATOR_LOSS = "plug_in_loss", "emulator_loss"
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class Measures(Protocol):
    """What measures adapters: :class:`offsite_fl.measure.Measure` does."""

    def plug_in(self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None) -> Row:
        """The full model with the adapter plugged in."""

    def use_patch(self, patch: Patch | None) -> None:
        """What is on the emulator from now on, beside the bundle's values."""

    def emulator_tuned(self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None) -> Row:
        """The emulator with the adapter."""


def central_evaluation(
    measure: Measures,
    lora: LoraOptions | None = None,
    *,
    every: int = 1,
    patch: Callable[[], Patch | None] | None = None,
) -> EvaluateFn:
    """An ``evaluate_fn`` for ``start()``: losses of plug-in and emulator in nats per token.

    ``every`` is the number of rounds between two evaluations, counted from round 0. The metrics' names are what
    :class:`OffsiteTuning` puts into the round's record, and so into the curves of the report. ``patch`` gives what is
    on the data owners' emulators at the time: ``lambda: strategy.patch``.
    """

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every:
            return None
        if patch is not None:
            measure.use_patch(patch())
        tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        rows = {PLUG_IN_LOSS: measure.plug_in(tensors, lora), EMULATOR_LOSS: measure.emulator_tuned(tensors, lora)}
        return MetricRecord({name: float(row.loss) for name, row in rows.items() if row.loss is not None})

    return evaluate
