"""What a comparison is made on, as examples: each part apart from the others, and digests that name them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from datasets import Dataset, concatenate_datasets  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.choosing.settings import Settings
from offsite_fl.config import LossOn
from offsite_fl.data.contents import contents_of
from offsite_fl.data.examples import split_examples
from offsite_fl.data.fingerprints import leak
from offsite_fl.data.images import LABELS, transform_of
from offsite_fl.data.loader import Batch, make_loader
from offsite_fl.data.sources import Source
from offsite_fl.errors import ConfigError, DataError

Sources: TypeAlias = Source | Sequence[Source]
Reader: TypeAlias = Callable[[Source, int, LossOn], Dataset]

HELD_BACK = 0.1


@dataclass(frozen=True)
class Private:
    """A data owner's examples in three disjoint parts: to tune on, to choose the learning rate by, to measure on."""

    train: Dataset
    validation: Dataset
    test: Dataset


@dataclass(frozen=True)
class Parts:
    """Public examples that methods work on (``calibration``), those that they never see (``public``), and private."""

    calibration: Dataset
    public: Dataset
    private: Private | None
    pad_id: int

    def batches(self, examples: Dataset, batch_size: int = 8) -> tuple[Batch, ...]:
        """``examples`` in order, as batches."""
        return tuple(make_loader(examples, batch_size, pad_id=self.pad_id))

    def leak(self) -> str | None:
        """A sentence where test examples are also among the public or private ones that are worked on; else None."""
        if self.private is None:
            return None
        return leak((self.calibration, self.private.train, self.private.validation), self.private.test)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the contents and labels of each part, and of how images become pixels."""
        parts = {"calibration": self.calibration, "public": self.public}
        if self.private is not None:
            private = self.private
            parts |= {"train": private.train, "validation": private.validation, "test": private.test}
        found = {name: digest_of(examples) for name, examples in parts.items()}
        pixels = transform_of(self.calibration)
        if pixels is not None:
            found["processor"] = hashlib.sha256(pixels.processor.to_json_string().encode()).hexdigest()
        return found


def read_parts(
    read: Reader,
    pad_id: int,
    settings: Settings,
    calibration: Source,
    data: Sources | None = None,
    test: Source | None = None,
) -> Parts:
    """Read and divide all sources; ``DataError`` says which is too short or unreadable.

    ``read`` makes examples of a source, a number of tokens and what the loss is on, as ``ModelOwner.examples`` does.
    """
    if test is not None and data is None:
        raise ConfigError("test data measure tuned candidates, so they need data to tune on: give data too")
    size, loss_on = settings.tune.block_size, settings.tune.loss_on
    fit, held_out = _divide_public(read(calibration, size, "all"), settings)
    private = None
    if data is not None:
        several = data if isinstance(data, list | tuple) else [data]
        pooled = [read(source, size, loss_on) for source in several]
        if not pooled:
            raise DataError("data: give at least one source")
        measured = None if test is None else read(test, size, loss_on)
        private = _divide_private(concatenate_datasets(pooled), measured, settings)
    return Parts(fit, held_out, private, pad_id)


def _divide_public(examples: Dataset, settings: Settings) -> tuple[Dataset, Dataset]:
    """What methods may use, and what follows it; where there is little an eighth is kept apart."""
    if len(examples) < 3:
        of = f" of {settings.tune.block_size} tokens" if settings.kind.unit == "tokens" else ""
        raise DataError(
            f"the calibration source makes {len(examples)} example(s){of}, at least 3 are needed: two to work on and "
            f"one held out; give more{' text or a smaller block-size' if of else ''}"
        )
    examples = settings.kind.arranged(examples)
    fit, held = max(2, settings.most("calibration")), settings.most("held_out")
    if fit + held > len(examples):
        held = min(held, max(1, len(examples) // 8))
        fit = min(fit, len(examples) - held)
    return examples.select(range(fit)), examples.select(range(fit, fit + held))


def _divide_private(pooled: Dataset, test: Dataset | None, settings: Settings) -> Private:
    """The same parts for every candidate and seed, so that only what is compared differs."""
    seed, kind = settings.tune.seed, settings.kind
    if test is None:
        pooled, test = split_examples(pooled, HELD_BACK, seed)
    train, validation = split_examples(pooled, HELD_BACK, seed)
    assert test is not None and validation is not None  # a share above 0 was held back
    return Private(
        train,
        _first(kind.arranged(validation), kind.validation),
        _first(kind.arranged(test), settings.most("test")),
    )


def _first(examples: Dataset, most: int) -> Dataset:
    return examples.select(range(min(len(examples), most)))


def digest_of(examples: Dataset) -> str:
    """SHA-256 over the contents (token ids, or an image's own digest) and the labels of ``examples``."""
    total = hashlib.sha256()
    for row in zip(contents_of(examples), examples.with_format(None)[LABELS], strict=True):
        for entry in row:
            values = np.frombuffer(entry, np.uint8) if isinstance(entry, bytes) else np.atleast_1d(entry)
            total.update(len(values).to_bytes(8, "big") + values.astype(np.int64).tobytes())
    return total.hexdigest()


def name_of(source: Source) -> str:
    """A source as a reader of the page knows it: the file's name, or that it is a dataset in memory."""
    return Path(source).name if isinstance(source, str | Path) else f"dataset of {len(source)} rows"
