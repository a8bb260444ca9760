"""Evaluation on the server: what the adapter is worth in the full model and in the emulator, round by round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from flwr.app import ArrayRecord, MetricRecord

from offsite_fl.config import LoraOptions
from offsite_fl.evaluation.rows import Row
from offsite_fl.patch import Patch

PLUG_IN, EMULATOR = "plug_in", "emulator"
_FIELDS = tuple(field.name for field in dataclasses.fields(Row))
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
    """An ``evaluate_fn`` for ``start()``: the rows of plug-in and emulator, in whatever ``measure`` measures.

    A row in loss becomes the metrics ``plug_in_loss`` and ``emulator_loss`` in nats per token, one in accuracy
    ``plug_in_accuracy`` and ``emulator_accuracy`` in [0, 1]. ``every`` is the number of rounds between two evaluations,
    counted from round 0. The metrics' names are what :class:`OffsiteTuning` puts into the round's record
    (:func:`row_of`), and so into the curves of the report. ``patch`` gives what is
    on the data owners' emulators at the time: ``lambda: strategy.patch``.
    """

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % every:
            return None
        if patch is not None:
            measure.use_patch(patch())
        tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        rows = {PLUG_IN: measure.plug_in(tensors, lora), EMULATOR: measure.emulator_tuned(tensors, lora)}
        return MetricRecord(
            {
                f"{name}_{field}": float(value)
                for name, row in rows.items()
                for field in _FIELDS
                if (value := getattr(row, field)) is not None
            }
        )

    return evaluate


def row_of(metrics: Mapping[str, object], name: str) -> Row | None:
    """The row ``name`` that an ``evaluate_fn`` reported, as :func:`central_evaluation` writes it; None without one.

    A loss counts where there are both: curves and rows of a run hold one measure.
    """
    known = {field: metrics.get(f"{name}_{field}") for field in _FIELDS}
    found = {field: float(value) for field, value in known.items() if isinstance(value, int | float)}
    return Row(loss=found["loss"]) if "loss" in found else Row(**found) if "accuracy" in found else None
