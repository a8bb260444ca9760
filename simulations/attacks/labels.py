"""Label flip for language models: a data owner that trains in good order towards the wrong tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Literal

from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from flwr.app import Context
from transformers import PreTrainedTokenizerBase

from offsite_fl.client_app import Data, LoadData
from offsite_fl.data.examples import to_examples
from offsite_fl.errors import DataError


def flip(examples: Dataset, classes: int) -> Dataset:
    """The examples with label ``t`` turned into ``classes - 1 - t``; inputs, and labels without loss, stay.

    The label flipping of Fang et al. 2020, "Local Model Poisoning Attacks" (arXiv 1911.11815, section 4), with the
    vocabulary for classes. It is one fixed permutation, its own inverse, so training succeeds: it minimises the loss of
    predicting the wrong token.
    """
    labels = [[classes - 1 - label if label >= 0 else label for label in row] for row in examples["labels"]]
    if any(classes - 1 < label for row in examples["labels"] for label in row):
        raise DataError(f"labels can't be flipped: one lies outside of the {classes} tokens of the vocabulary")
    return Dataset.from_dict({"input_ids": examples["input_ids"], "labels": labels})


def with_flipped_labels(
    load_data: LoadData,
    attackers: Collection[int],
    tokenizer: Callable[[Context], PreTrainedTokenizerBase],
    block_size: int | Callable[[Context], int] = 128,
    loss_on: Literal["all", "answer"] = "all",
) -> LoadData:
    """``load_data`` whose ``attackers``, by partition id, get flipped labels to tune on.

    Labels are token ids, so the text is tokenised here: ``tokenizer`` and ``block_size`` must be those of the run.
    Validation data, where ``load_data`` gives some, stay as they are.
    """

    @functools.wraps(load_data)
    def load(context: Context) -> Data:
        loaded = load_data(context)
        if context.node_config.get("partition-id") not in attackers:
            return loaded
        size = block_size if isinstance(block_size, int) else block_size(context)
        train, *held_out = loaded if isinstance(loaded, tuple) else (loaded,)
        words = tokenizer(context)
        flipped = flip(to_examples(train, words, block_size=size, loss_on=loss_on), len(words))
        return (flipped, held_out[0]) if held_out else flipped

    return load
