"""Rows of plug-in and emulator as Flower's ``evaluate_fn``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord

from offsite_fl.config import LoraOptions
from offsite_fl.evaluation.rows import Row
from offsite_fl.strategies import central_evaluation
from offsite_fl.strategies.central import row_of

from .conftest import FIRST


class Sums:
    """Measures the sum of all values, and for plug-in the rank of the factors on top."""

    def plug_in(self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None) -> Row:
        return Row(loss=self._sum(tensors) + (lora.rank if lora else 0))

    def emulator_tuned(self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None) -> Row:
        for value in tensors.values():
            value += 0  # what is given may be written to
        return Row(loss=self._sum(tensors))

    def _sum(self, tensors: Mapping[str, Any]) -> float:
        return sum(float(value.sum()) for value in tensors.values())


def test_losses_by_round() -> None:
    evaluate = central_evaluation(Sums(), LoraOptions(rank=3), every=2)
    arrays = ArrayRecord(dict(FIRST))
    assert [evaluate(r, arrays) is None for r in range(4)] == [False, True, False, True]
    assert evaluate(2, arrays) == {"plug_in_loss": 13.5, "emulator_loss": 10.5}


class Shares(Sums):
    """The same in accuracy: what is between 0 and 1 of a hundredth of the sum."""

    def plug_in(self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None) -> Row:
        return Row(accuracy=self._sum(tensors) / 100)

    emulator_tuned = plug_in


def test_accuracies_by_round() -> None:
    metrics = central_evaluation(Shares())(0, ArrayRecord(dict(FIRST)))
    assert metrics == {"plug_in_accuracy": 0.105, "emulator_accuracy": 0.105}
    assert row_of(metrics, "plug_in") == Row(accuracy=0.105)


def test_rows_of_what_an_evaluation_reported() -> None:
    reported = {"plug_in_loss": 2, "plug_in_accuracy": 0.5, "emulator_accuracy": 0.25, "counts": [1, 2]}
    assert row_of(reported, "plug_in") == Row(loss=2.0)
    assert row_of(reported, "emulator") == Row(accuracy=0.25)
    assert row_of(reported, "counts") is None


class Classes(Sums):
    """A classifier's rows."""

    def plug_in(self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None) -> Row:
        return Row(accuracy=0.75, f1=0.5)

    emulator_tuned = plug_in


def test_an_f1_travels_with_its_accuracy() -> None:
    metrics = central_evaluation(Classes())(0, ArrayRecord(dict(FIRST)))
    assert metrics is not None and metrics["plug_in_f1"] == 0.5
    assert row_of(metrics, "emulator") == Row(accuracy=0.75, f1=0.5)
