"""The one place where text and classes differ: how examples are counted and put in order, measured, and spoken of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import nn

from offsite_fl.choosing.candidates import CLASSIFIERS, DEFAULTS
from offsite_fl.choosing.yardstick import ACCURACY, LOSS, LOSS_OF_CLASSES, Yardstick
from offsite_fl.data.images import LABELS
from offsite_fl.data.loader import Batch
from offsite_fl.evaluation.classification import evaluate_classes
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.tasks import CLASSIFICATION


@dataclass(frozen=True)
class Score:
    """Of a network on some examples: mean ``loss`` in nats, and where there are classes the share that is right."""

    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Kind:
    """What a comparison is about.

    Sizes of its parts count ``unit``. ``arranged`` puts examples in an order of which every beginning is a fair sample,
    ``score`` measures a network, and ``validation`` examples are enough to rank learning rates by: more would cost each
    candidate as much as its tuning. Candidates are judged in ``judged_in``; ``loss`` is how losses are told.
    """

    unit: Literal["tokens", "examples"]
    public: str
    arranged: Callable[[Dataset], Dataset]
    score: Callable[[nn.Module, Sequence[Batch], bool], Score]
    validation: int
    loss: Yardstick
    judged_in: Yardstick
    candidates: tuple[str, ...]

    @property
    def yardsticks(self) -> tuple[Yardstick, ...]:
        """What is shown of tuned networks, first what they are judged in."""
        return tuple(dict.fromkeys((self.judged_in, self.loss)))


def by_turns(examples: Dataset) -> Dataset:
    """Labelled examples in an order of which every beginning has the classes in their proportion, one of each in front.

    The i-th of the n examples of a class, counted from 0, stands at i / n. Files often have one class after the other.
    """
    labels = examples.with_format(None)[LABELS]
    rows: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    places = [(i / len(of_class), row) for of_class in rows.values() for i, row in enumerate(of_class)]
    return examples.select([row for _, row in sorted(places)])


def _of_text(model: nn.Module, batches: Sequence[Batch], progress: bool) -> Score:
    return Score(evaluate_loss(model, batches, progress=progress).loss)


def _of_classes(model: nn.Module, batches: Sequence[Batch], progress: bool) -> Score:
    found = evaluate_classes(model, batches, progress=progress)
    return Score(found.loss, found.accuracy)


def _as_they_are(examples: Dataset) -> Dataset:
    return examples


TEXT = Kind("tokens", "public text", _as_they_are, _of_text, 16, LOSS, LOSS, DEFAULTS)
CLASSES = Kind("examples", "public examples", by_turns, _of_classes, 64, LOSS_OF_CLASSES, ACCURACY, CLASSIFIERS)


def kind_of(task: str) -> Kind:
    """What a comparison of a model for ``task`` is about."""
    return CLASSES if task in CLASSIFICATION else TEXT
