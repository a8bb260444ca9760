"""Accuracy, macro F1 and the loss of classifiers, by hand and against slow plain versions."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from offsite_fl.data.by_task import examples_for
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import make_loader
from offsite_fl.errors import DataError, ModelError
from offsite_fl.evaluation.classification import class_nll, evaluate_classes, macro_f1
from offsite_fl.evaluation.loss import causal_nll, evaluate_loss
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.evaluation.rows import FiveRows, Row
from offsite_fl.evaluation.tables import rows_table
from tests.pico_classifiers import NAMES, labelled_rows, make_classifier


class Told(nn.Module):
    """Gives the logits that it is given as pixels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values):
        return SequenceClassifierOutput(logits=pixel_values)


def batch_of(logits, labels):
    return {"pixel_values": torch.tensor(logits), "labels": torch.tensor(labels)}


def test_by_hand():
    ln3 = math.log(3)
    batches = [batch_of([[ln3, 0.0], [0.0, ln3]], [0, 0]), batch_of([[0.0, ln3]], [1])]
    found = evaluate_classes(Told(), batches)
    # right: the first and the last. -ln 3/4 twice, -ln 1/4 once.
    assert found.accuracy == pytest.approx(2 / 3) and found.examples == 3
    assert found.loss == pytest.approx(-(2 * math.log(0.75) + math.log(0.25)) / 3)
    # both classes: TP 1, and of FP + FN one each: 2 / 3
    assert found.f1 == pytest.approx(2 / 3)
    assert found.row == Row(accuracy=found.accuracy, f1=found.f1)


def test_macro_f1_against_a_plain_version():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found, labels = (torch.randint(0, 4, (13,), generator=generator) for _ in range(2))
        scores = []
        for label in sorted({*found.tolist(), *labels.tolist()}):
            tp = sum(f == label == t for f, t in zip(found.tolist(), labels.tolist(), strict=True))
            precision = tp / max(1, found.tolist().count(label))
            recall = tp / max(1, labels.tolist().count(label))
            scores.append(0 if tp == 0 else 2 * precision * recall / (precision + recall))
        assert macro_f1(found, labels) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_the_loss_is_transformers_own(kind, pico_tokenizer):
    model = make_classifier(kind)
    batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])}
    if kind != "vit":
        rows = examples_for(
            "sequence-classification",
            Dataset.from_list(labelled_rows(1)),
            pico_tokenizer,
            Classes(NAMES),
            block_size=16,
        )
        (batch,) = make_loader(rows, 3, pad_id=0)
    nats, count = class_nll(model, batch)
    assert count == 3
    torch.testing.assert_close(nats / 3, model(**batch).loss)
    mean = evaluate_loss(model, [batch], nll=class_nll)
    assert mean.loss == pytest.approx(float(nats.detach()) / 3) and mean.tokens == 3


def test_padding_changes_nothing(pico_tokenizer):
    rows = examples_for(
        "sequence-classification", Dataset.from_list(labelled_rows(3)), pico_tokenizer, Classes(NAMES), block_size=16
    )
    for kind in ("bert", "llama"):
        model = make_classifier(kind)
        together, alone = (evaluate_classes(model, make_loader(rows, size, pad_id=0)) for size in (9, 1))
        assert together.loss == pytest.approx(alone.loss, rel=1e-5)


def test_the_objective_goes_by_the_models_task(pico_llama, pico_batch):
    assert objective_of(make_classifier("bert")).nll is class_nll
    assert objective_of(pico_llama).nll is causal_nll
    assert objective_of(nn.Linear(2, 2)).nll is causal_nll
    # 12 tokens predict 11, 9 predict 8
    assert objective_of(pico_llama).count(pico_batch) == 19
    assert objective_of(make_classifier("vit")).count({"labels": torch.tensor([1, 2])}) == 2
    with pytest.raises(DataError, match="labels"):
        objective_of(pico_llama).count({})


def test_the_other_tasks_loss_is_refused(pico_llama, pico_batch):
    with pytest.raises(DataError, match="one class for each example"):
        class_nll(pico_llama, pico_batch)
    with pytest.raises(ModelError, match="no classes"):
        class_nll(pico_llama, {**pico_batch, "labels": torch.tensor([0, 1])})
    with pytest.raises(ModelError, match="no next-token loss"):
        causal_nll(make_classifier("bert"), pico_batch)
    with pytest.raises(DataError, match="no example"):
        evaluate_classes(Told(), [])


def test_rows_with_f1_are_kept_and_shown():
    row = Row(accuracy=0.5, f1=0.25)
    assert Row.from_dict(row.to_dict()) == row and "f1" not in Row(accuracy=0.5).to_dict()
    rows = FiveRows(row, row, row, Row(accuracy=0.75, f1=0.7), Row(accuracy=1.0, f1=1.0))
    assert rows.has_f1 and rows.recovered == 0.5
    assert [str(column.header) for column in rows_table(rows).columns] == ["", "accuracy", "macro F1", "better by"]
    assert list(rows_table(rows).columns[2].cells)[3] == "70.0%"
    for wrong in ({"loss": 1.0, "f1": 0.5}, {"f1": 0.5}, {"accuracy": 0.5, "f1": 1.5}):
        with pytest.raises(DataError):
            Row(**wrong)
