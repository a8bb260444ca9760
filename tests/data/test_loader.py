"""Padding by hand; order fixed by seed and epoch."""

import pytest
import torch
from datasets import Dataset

from offsite_fl.data.loader import make_loader
from offsite_fl.errors import DataError


def test_padding_on_the_right():
    examples = Dataset.from_dict({"input_ids": [[5, 6, 7], [8]], "labels": [[-100, 6, 7], [8]]})
    (batch,) = make_loader(examples, 4, pad_id=9)
    assert {name: t.tolist() for name, t in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert all(t.dtype == torch.int64 for t in batch.values())


def order(loader):
    return [row for batch in loader for row in batch["input_ids"][:, 0].tolist()]


def test_order_depends_on_seed_and_epoch_only():
    rows = [[i, 0] for i in range(20)]
    examples = Dataset.from_dict({"input_ids": rows, "labels": rows})
    first = make_loader(examples, 3, pad_id=0, shuffle=True, seed=1)
    epochs = [order(first), order(first)]
    torch.rand(5)
    second = make_loader(examples, 3, pad_id=0, shuffle=True, seed=1)
    assert [order(second), order(second)] == epochs
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert order(make_loader(examples, 3, pad_id=0, shuffle=True, seed=2)) != epochs[0]
    assert order(make_loader(examples, 3, pad_id=0)) == list(range(20))
    assert len(first) == 7


def test_examples_must_be_examples():
    with pytest.raises(DataError, match="no column 'labels'"):
        make_loader(Dataset.from_dict({"input_ids": [[1]]}), 1, pad_id=0)
    with pytest.raises(DataError, match="no examples"):
        make_loader(Dataset.from_dict({"input_ids": [], "labels": []}), 1, pad_id=0)
