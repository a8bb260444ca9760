"""Files to examples, by what the model is for: next-token text, labelled text, or labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Value  # type: ignore[import-untyped,unused-ignore]
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from offsite_fl.config import LossOn
from offsite_fl.data.examples import to_examples
from offsite_fl.data.images import image_examples
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import pad_id_of
from offsite_fl.data.sources import Source, read_table
from offsite_fl.errors import DataError, ModelError
from offsite_fl.models.processors import Processor, check_processor, need_tokenizer
from offsite_fl.models.tasks import CLASSIFICATION
from offsite_fl.registry import near

_AT_ONCE = 1000


def classes_of(task: str, config: Any) -> Classes | None:
    """The classes of a model for one of the classification tasks; None for all other tasks."""
    return Classes.of_config(config) if task in CLASSIFICATION else None


def pad_id_for(task: str, processor: Processor, config: Any) -> int:
    """Token id that fills short rows of a batch: for a classifier that of its config, if there is one.

    By it decoders find the last token of a text, whose state they classify; any other id would count as text.
    """
    own = getattr(config, "pad_token_id", None) if task in CLASSIFICATION else None
    return own if isinstance(own, int) and own >= 0 else pad_id_of(processor)


def examples_for(
    task: str,
    source: Source,
    processor: Processor,
    classes: Classes | None = None,
    *,
    block_size: int,
    loss_on: LossOn = "all",
    labelled: bool = True,
) -> Dataset:
    """The examples of ``source`` for a model of ``task``, whose ``processor`` and ``classes`` go with it.

    Labelled text has the columns ``text`` and ``label`` and becomes ``input_ids`` (at most ``block_size`` tokens, the
    tokenizer's special ones included) and ``labels``; for images see :func:`offsite_fl.data.images.image_examples`; all
    other tasks take what :func:`offsite_fl.data.examples.to_examples` takes. ``labelled=False`` reads inputs alone.

    Raises
    ------
    DataError
        Names the file, the line and the column, and what would be right.
    """
    if task not in CLASSIFICATION:
        return to_examples(source, need_tokenizer(processor), block_size=block_size, loss_on=loss_on)
    check_processor(processor, task)
    if classes is None:
        raise ModelError(f"a model for {task} needs its classes: give what classes_of makes of its config")
    if isinstance(processor, BaseImageProcessor):
        return image_examples(source, processor, classes, labelled=labelled)
    return labelled_text(source, processor, classes, block_size=block_size, labelled=labelled)


def has_labels(source: Source) -> bool:
    """Whether ``source`` tells a class for each of its rows: a column ``label`` or ``labels``, or folders inside."""
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return any(path.is_dir() for path in Path(source).iterdir() if not path.name.startswith("."))
    columns = source.column_names if isinstance(source, Dataset) else read_table(source).columns
    return bool({"label", "labels"} & set(columns))


def labelled_text(
    source: Source, tokenizer: PreTrainedTokenizerBase, classes: Classes, *, block_size: int, labelled: bool = True
) -> Dataset:
    """Rows with ``text`` and ``label`` as ``input_ids`` and ``labels``; a dataset that has both already stays."""
    ready: Any = source if isinstance(source, Dataset) and "input_ids" in source.column_names else None
    if ready is not None and (not labelled or isinstance(ready.features.get("labels"), Value)):
        return ready
    table = read_table(source)
    if "text" not in table.columns:
        raise DataError(f"{table.name}: needs a column 'text'; {near('text', table.columns)}")
    texts = table.text("text")
    for row, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"{table.where(row)}, column 'text': the text is empty")
    ids: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        ids += tokenizer(part, truncation=True, max_length=block_size, verbose=False)["input_ids"]
    if not labelled:
        return Dataset.from_dict({"input_ids": ids})
    return Dataset.from_dict({"input_ids": ids, "labels": classes.of_table(table, "label")})
