"""What is minimised, by what a model is for: a closed table of two losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from offsite_fl.data.examples import IGNORE
from offsite_fl.errors import DataError
from offsite_fl.evaluation.classification import class_nll
from offsite_fl.evaluation.loss import causal_nll
from offsite_fl.models.tasks import CLASSIFICATION, need_loss, task_of

Batch = Mapping[str, Tensor]
Nll = Callable[[nn.Module, Batch], tuple[Tensor, int]]


@dataclass(frozen=True)
class Objective:
    """``nll``: sum in nats over a batch, with gradient, and over how many it goes; ``count`` tells that beforehand."""

    nll: Nll
    count: Callable[[Batch], int]


def _labels(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise DataError("examples have no column 'labels', which the loss needs; make them with examples_for")
    return batch["labels"]


def _tokens(batch: Batch) -> int:
    return int((_labels(batch)[:, 1:] != IGNORE).sum())


def _examples(batch: Batch) -> int:
    return len(_labels(batch))


_NEXT_TOKEN = Objective(causal_nll, _tokens)
_CLASS = Objective(class_nll, _examples)


def objective_of(model: nn.Module) -> Objective:
    """The loss that ``model`` is tuned by: of classes for the two classification tasks, else of the next token.

    ``ModelError`` for a model for any other task; a class unknown to transformers is tried.
    """
    need_loss(model)
    return _CLASS if task_of(model) in CLASSIFICATION else _NEXT_TOKEN
