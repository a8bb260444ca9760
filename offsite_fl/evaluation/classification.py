"""Classifiers: the loss for tuning, and accuracy and F1 for the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from offsite_fl.errors import DataError
from offsite_fl.evaluation.loss import evaluating
from offsite_fl.evaluation.rows import Row
from offsite_fl.models.tasks import need_classes

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ClassResult:
    """``accuracy`` and macro ``f1`` as shares in [0, 1], mean ``loss`` in nats per example, over ``examples``."""

    accuracy: float
    f1: float
    loss: float
    examples: int

    @property
    def row(self) -> Row:
        """The row of a result."""
        return Row(accuracy=self.accuracy, f1=self.f1)


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, classes] in fp32; ``ModelError`` if ``model`` is one of transformers' for another task."""
    need_classes(model)
    logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits.float()


def class_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross entropy in nats of a batch with ``labels`` [B], with gradient, and how many examples it has.

    ``DataError`` if the examples carry no class each.
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 1:
        raise DataError("the loss of a classifier needs one class for each example; give labelled examples")
    return F.cross_entropy(class_logits(model, batch), labels, reduction="sum"), len(labels)


@torch.no_grad()
def predictions(
    model: nn.Module, batches: Iterable[Batch], device: torch.device | str | None = None, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] in fp32 and classes [N] of all examples, on the CPU; the model's mode is restored."""
    device = device if device is not None else next(model.parameters()).device
    logits, labels = [], []
    with evaluating(model):
        for batch in track(batches, "evaluating", disable=not progress, transient=True):
            logits.append(class_logits(model, {name: value.to(device) for name, value in batch.items()}).cpu())
            labels.append(batch["labels"].cpu())
    if not logits:
        raise DataError("there is no example to evaluate on; give at least one")
    return torch.cat(logits), torch.cat(labels)


def evaluate_classes(
    model: nn.Module, batches: Iterable[Batch], device: torch.device | str | None = None, progress: bool = False
) -> ClassResult:
    """Accuracy, macro F1 and loss of a classifier; ``device=None`` uses that of the model's first parameter."""
    logits, labels = predictions(model, batches, device, progress)
    found = logits.argmax(-1)
    return ClassResult(
        accuracy=float((found == labels).float().mean()),
        f1=macro_f1(found, labels),
        loss=float(F.cross_entropy(logits.double(), labels)),
        examples=len(labels),
    )


def macro_f1(found: Tensor, labels: Tensor) -> float:
    """Mean over classes of ``2 TP / (2 TP + FP + FN)``, over those that occur in ``labels`` or in ``found``, both [N].

    scikit-learn's ``f1_score(average="macro")``: a class that is found and never right counts as 0.

    >>> round(macro_f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])), 4)
    0.6667
    """
    scores = []
    for label in sorted({*found.tolist(), *labels.tolist()}):
        right = int(((found == label) & (labels == label)).sum())
        scores.append(2 * right / (int((found == label).sum()) + int((labels == label).sum())))
    return sum(scores) / len(scores)
