"""Examples to batches, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from offsite_fl.data.examples import IGNORE
from offsite_fl.errors import DataError

Batch = dict[str, Tensor]


class SeededOrder(Sampler[int]):
    """Row numbers in the order of ``epoch``, which grows by one each time they are gone through."""

    def __init__(self, rows: int, shuffle: bool, seed: int) -> None:
        self.rows, self.shuffle, self.seed, self.epoch = rows, shuffle, seed, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if not self.shuffle:
            return iter(range(self.rows))
        # A generator of its own: the order must depend on nothing else that draws random numbers.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return iter(torch.randperm(self.rows, generator=generator).tolist())


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id that fills short rows of a batch; they carry no loss, so any id will do where none is meant for it."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def make_loader(
    examples: Dataset, batch_size: int, *, pad_id: int, shuffle: bool = False, seed: int = 0
) -> DataLoader[dict[str, Any]]:
    """Batches of ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]`` int64, padded on the right.

    ``T`` is the longest example of the batch. With ``shuffle`` every epoch has another order; the whole sequence of
    epochs is fixed by ``seed``. The last batch of an epoch may be smaller.
    """
    for column in ("input_ids", "labels"):
        if column not in examples.column_names:
            raise DataError(f"examples have no column {column!r}; make them with to_examples")
    if len(examples) == 0:
        raise DataError("there are no examples; give at least one")

    def collate(rows: Sequence[dict[str, Any]]) -> Batch:
        return pad_batch(rows, pad_id)

    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=SeededOrder(len(examples), shuffle, seed),
        collate_fn=collate,
    )


def pad_batch(rows: Sequence[dict[str, Any]], pad_id: int) -> Batch:
    """Stack examples of different lengths; padding has attention 0 and label -100."""
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.as_tensor(row["input_ids"])
        labels[i, :length] = torch.as_tensor(row["labels"])
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
