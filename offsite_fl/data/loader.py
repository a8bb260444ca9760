"""Examples to batches, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from offsite_fl.config import Augment
from offsite_fl.data.augment import augmented
from offsite_fl.data.examples import IGNORE
from offsite_fl.data.images import IMAGE, LABELS, opened, transform_of
from offsite_fl.errors import ConfigError, DataError

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


def pad_id_of(processor: Any) -> int:
    """Token id that fills short rows of a batch; they carry no loss, so any id will do where none is meant for it.

    0 for an image processor: images of a batch have one size.
    """
    pad = getattr(processor, "pad_token_id", None)
    return int((pad if pad is not None else getattr(processor, "eos_token_id", None)) or 0)


def make_loader(
    examples: Dataset,
    batch_size: int,
    *,
    pad_id: int,
    shuffle: bool = False,
    seed: int = 0,
    augment: Augment = "none",
    labelled: bool = True,
) -> DataLoader[dict[str, Any]]:
    """Batches of ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]`` int64, padded on the right.

    ``T`` is the longest example of the batch. Where an example has one class, ``labels`` is ``[B]``; of images there
    are ``pixel_values`` ``[B, C, H, W]`` fp32 in place of tokens, changed at random as ``augment`` says. With
    ``shuffle`` every epoch has another order; the whole sequence of epochs is fixed by ``seed``. The last batch of an
    epoch may be smaller. ``labelled=False`` takes examples without labels too, for calibration.
    """
    if labelled and LABELS not in examples.column_names:
        raise DataError(f"examples have no column {LABELS!r}; make them with examples_for from labelled data")
    if len(examples) == 0:
        raise DataError("there are no examples; give at least one")
    order = SeededOrder(len(examples), shuffle, seed)
    if transform_of(examples) is not None:
        rows: Any = _ImageRows(examples, order, seed, augment)
        return DataLoader(rows, batch_size=batch_size, sampler=order, collate_fn=stack_batch)
    if augment != "none":
        raise ConfigError(f"augment = {augment!r} is for images, these examples are text; leave it out")
    if "input_ids" not in examples.column_names:
        raise DataError("examples have no column 'input_ids'; make them with examples_for")

    def collate(rows: Sequence[dict[str, Any]]) -> Batch:
        return pad_batch(rows, pad_id)

    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=order,
        collate_fn=collate,
    )


class _ImageRows:
    """The rows of a dataset of images as pixels, changed at random by the epoch that ``order`` is in."""

    def __init__(self, examples: Dataset, order: SeededOrder, seed: int, augment: Augment) -> None:
        found = transform_of(examples)
        assert found is not None
        self.transform, self.plain = found, examples.with_format(None)
        self.order, self.seed, self.augment = order, seed, augment

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, row: int) -> dict[str, Any]:
        entry = self.plain[row]
        image = opened(entry.pop(IMAGE))
        # The order is one epoch ahead as soon as it is gone through.
        epoch = self.order.epoch - 1
        return {"pixel_values": augmented(image, self.transform, self.augment, self.seed, epoch, row), **entry}


def stack_batch(rows: Sequence[dict[str, Any]]) -> Batch:
    """Examples of one shape as one tensor for each column; ``DataError`` if images differ in size."""
    sizes = {tuple(row["pixel_values"].shape) for row in rows}
    if len(sizes) > 1:
        raise DataError(f"the image processor makes images of different sizes, {sorted(sizes)[:2]}: set its size")
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def pad_batch(rows: Sequence[dict[str, Any]], pad_id: int) -> Batch:
    """Stack examples of different lengths; padding has attention 0 and label -100.

    Examples that have one class each, an int under ``labels``, or no label, are padded in their tokens alone.
    """
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    if isinstance(rows[0].get("labels", 0), int):
        tokens = pad_batch([{**row, "labels": row["input_ids"]} for row in rows], pad_id)
        del tokens["labels"]
        return tokens | ({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.as_tensor(row["input_ids"])
        labels[i, :length] = torch.as_tensor(row["labels"])
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
