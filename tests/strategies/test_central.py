"""Losses of plug-in and emulator as Flower's ``evaluate_fn``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord

from offsite_fl.config import LoraOptions
from offsite_fl.evaluation.rows import Row
from offsite_fl.strategies import central_evaluation

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
