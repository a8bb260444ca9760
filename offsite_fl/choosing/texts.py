"""The texts of a comparison as examples, each part apart from the others, and digests that name them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from datasets import Dataset, concatenate_datasets  # type: ignore[import-untyped,unused-ignore]
from transformers import PreTrainedTokenizerBase

from offsite_fl.choosing.settings import Settings
from offsite_fl.data.examples import split_examples, to_examples
from offsite_fl.data.loader import Batch, make_loader, pad_id_of
from offsite_fl.data.sources import Source
from offsite_fl.errors import ConfigError, DataError

Sources: TypeAlias = Source | Sequence[Source]

# Enough to rank learning rates by; more would cost each candidate as much as its tuning.
VALIDATION_EXAMPLES = 16
HELD_BACK = 0.1


@dataclass(frozen=True)
class Private:
    """A data owner's text in three disjoint parts: to tune on, to choose the learning rate by, and to measure on."""

    train: Dataset
    validation: Dataset
    test: Dataset


@dataclass(frozen=True)
class Texts:
    """Public text that methods work on (``calibration``) and that they never see (``public``), and private text."""

    calibration: Dataset
    public: Dataset
    private: Private | None
    pad_id: int

    def batches(self, examples: Dataset, batch_size: int = 8) -> tuple[Batch, ...]:
        """``examples`` in order, as batches."""
        return tuple(make_loader(examples, batch_size, pad_id=self.pad_id))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the tokens and labels of each part."""
        parts = {"calibration": self.calibration, "public": self.public}
        if self.private is not None:
            private = self.private
            parts |= {"train": private.train, "validation": private.validation, "test": private.test}
        return {name: digest_of(examples) for name, examples in parts.items()}


def read_texts(
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    calibration: Source,
    data: Sources | None = None,
    test: Source | None = None,
) -> Texts:
    """Tokenise and divide all sources; ``DataError`` says which is too short or unreadable."""
    if test is not None and data is None:
        raise ConfigError("test data measure tuned candidates, so they need data to tune on: give data too")
    size, loss_on = settings.tune.block_size, settings.tune.loss_on
    fit, held_out = _divide_public(to_examples(calibration, tokenizer, block_size=size), settings)
    private = None
    if data is not None:
        several = data if isinstance(data, list | tuple) else [data]
        pooled = [to_examples(source, tokenizer, block_size=size, loss_on=loss_on) for source in several]
        if not pooled:
            raise DataError("data: give at least one source")
        measured = None if test is None else to_examples(test, tokenizer, block_size=size, loss_on=loss_on)
        private = _divide_private(concatenate_datasets(pooled), measured, settings)
    return Texts(fit, held_out, private, pad_id_of(tokenizer))


def _divide_public(examples: Dataset, settings: Settings) -> tuple[Dataset, Dataset]:
    """The text that methods may use, and what follows it; of a short text an eighth is kept apart."""
    size = settings.tune.block_size
    if len(examples) < 3:
        raise DataError(
            f"the calibration text makes {len(examples)} example(s) of {size} tokens, at least 3 are needed: two to "
            "work on and one held out; give more text or a smaller block-size"
        )
    fit, held = max(2, settings.calibration_tokens // size), max(1, settings.held_out_tokens // size)
    if fit + held > len(examples):
        held = min(held, max(1, len(examples) // 8))
        fit = min(fit, len(examples) - held)
    return examples.select(range(fit)), examples.select(range(fit, fit + held))


def _divide_private(pooled: Dataset, test: Dataset | None, settings: Settings) -> Private:
    """The same parts for every candidate and seed, so that only what is compared differs."""
    seed = settings.tune.seed
    if test is None:
        pooled, test = split_examples(pooled, HELD_BACK, seed)
    train, validation = split_examples(pooled, HELD_BACK, seed)
    assert test is not None and validation is not None  # a share above 0 was held back
    most = max(1, settings.test_tokens // settings.tune.block_size)
    return Private(
        train,
        validation.select(range(min(len(validation), VALIDATION_EXAMPLES))),
        test.select(range(min(len(test), most))),
    )


def digest_of(examples: Dataset) -> str:
    """SHA-256 over the token ids and labels of ``examples``."""
    total = hashlib.sha256()
    for row in examples:
        for column in ("input_ids", "labels"):
            values = np.asarray(row[column], dtype=np.int64)
            total.update(len(values).to_bytes(8, "big") + values.tobytes())
    return total.hexdigest()


def name_of(source: Source) -> str:
    """A source as a reader of the page knows it: the file's name, or that it is a dataset in memory."""
    return Path(source).name if isinstance(source, str | Path) else f"dataset of {len(source)} rows"
