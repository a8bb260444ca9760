"""Networks on labelled rows: their row of the five, and what they answer to the first few, for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from torch import nn

from classify.settings import LABEL
from offsite_fl.evaluation.classification import macro_f1, predictions
from offsite_fl.evaluation.rows import ROW_KEYS, Row
from offsite_fl.evaluation.samples import Sample
from offsite_fl.measure import Measure
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning


class Scored:
    """A :class:`~offsite_fl.measure.Measure` that remembers the classes that the latest network answered."""

    def __init__(self, owner: ModelOwner, rows: Dataset, block_size: int) -> None:
        self.measure = Measure(owner, rows, block_size=block_size, score=self._score)
        self.latest: list[int] = []

    def _score(self, network: nn.Module) -> Row:
        logits, labels = predictions(network, self.measure.batches, self.measure.device)
        found = logits.argmax(-1)
        self.latest = found.tolist()
        return Row(accuracy=float((found == labels).float().mean()), f1=macro_f1(found, labels))


def samples_of(
    owner: ModelOwner, rows: Dataset, strategy: OffsiteTuning, block_size: int, fully_tuned: list[int]
) -> list[Sample]:
    """The rows with the answers of the five networks; ``fully_tuned`` are the fifth's, empty where it wasn't run."""
    said = dict(zip(ROW_KEYS, _answers(owner, rows, strategy, block_size), strict=False))
    if fully_tuned:
        said[ROW_KEYS[-1]] = fully_tuned
    names = owner.model.config.id2label
    return [
        Sample(row[LABEL], {key: names[answers[number]] for key, answers in said.items()}, **_shown(row))
        for number, row in enumerate(rows)
    ]


def _answers(owner: ModelOwner, rows: Dataset, strategy: OffsiteTuning, block_size: int) -> Iterator[list[int]]:
    """Of the first four networks, in their order."""
    scored, update = Scored(owner, rows, block_size), strategy.update()
    measure = scored.measure
    measure.use_patch(strategy.patch)
    measure.full_zero_shot()
    yield scored.latest
    measure.emulator_zero_shot()
    yield scored.latest
    measure.emulator_tuned(update.tensors, update.lora)
    yield scored.latest
    measure.plug_in(update.tensors, update.lora)
    yield scored.latest


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """A row's picture as PNG in base64, or its text."""
    if "image" not in row:
        return {"text": row["text"]}
    file = io.BytesIO()
    row["image"].save(file, format="PNG")
    return {"image": base64.b64encode(file.getvalue()).decode("ascii")}
