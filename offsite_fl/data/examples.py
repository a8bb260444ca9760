"""Text to token ids with labels: documents packed into blocks, or pairs of a prompt and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from transformers import PreTrainedTokenizerBase

from offsite_fl.data.choices import ChoiceColumns, read_questions
from offsite_fl.data.contents import contents_of
from offsite_fl.data.sources import Source, Table, read_table
from offsite_fl.errors import ConfigError, DataError
from offsite_fl.registry import near

IGNORE = -100
"""The label of a position without loss, as in Hugging Face and torch."""

_AT_ONCE = 1000


@dataclass(frozen=True)
class TextOptions:
    """Names of the columns that hold plain text, or prompts and their answers, and choices where there are any."""

    text: str = "text"
    prompt: str = "prompt"
    answer: str = "answer"
    choices: str = "choices"


def to_examples(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    loss_on: Literal["all", "answer"] = "all",
    columns: TextOptions | None = None,
) -> Dataset:
    """Tokenise a file or dataset into examples of at most ``block_size`` tokens.

    Plain text becomes blocks of exactly ``block_size`` tokens; documents follow each other with the end-of-sequence
    token between them, and a last block that isn't full is left out. A table with prompts and answers becomes one
    example a row. One with both uses the pairs where ``loss_on="answer"`` and the text otherwise. Where there are
    ``choices`` too (multiple choice), the pair is the prompt and the right choice. A dataset that already has
    ``input_ids`` and ``labels`` is taken as it is.

    Returns
    -------
    A dataset with the columns ``input_ids`` and ``labels`` (-100 where no loss is taken).

    Raises
    ------
    DataError
        Names the file, the line and the column, and what would be right.
    """
    columns = columns or TextOptions()
    if loss_on not in ("all", "answer"):
        raise ConfigError(f"loss-on = {loss_on!r} isn't possible; {near(str(loss_on), ['all', 'answer'])}")
    if isinstance(source, Dataset) and {"input_ids", "labels"} <= set(source.column_names):
        return source
    table = read_table(source)
    has_pairs = columns.prompt in table.columns and columns.answer in table.columns
    if has_pairs and (loss_on == "answer" or columns.text not in table.columns):
        return _pairs(table, tokenizer, block_size, loss_on, columns)
    if columns.text in table.columns and loss_on == "all":
        return _packed(table, tokenizer, block_size, columns.text)
    raise DataError(_no_columns(table, loss_on, columns))


def _no_columns(table: Table, loss_on: str, columns: TextOptions) -> str:
    pair = f"{columns.prompt!r} and {columns.answer!r}"
    wanted = (
        f"columns {pair} (loss is on answers only)" if loss_on == "answer" else f"column {columns.text!r} or {pair}"
    )
    head = f"{table.name}, line 1" if table.lines is not None else table.name
    missing = [name for name in (columns.prompt, columns.answer) if name not in table.columns]
    sought = columns.text if loss_on == "all" and len(missing) == 2 else missing[0]
    return f"{head}: needs {wanted}; no {sought!r}: {near(sought, table.columns)}"


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    # verbose=False: a document longer than the model's context is no mistake here
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def _packed(table: Table, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str) -> Dataset:
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    texts = [text for text in table.text(column) if text.strip()]
    parts = []
    for start in range(0, len(texts), _AT_ONCE):
        documents = _tokens(tokenizer, texts[start : start + _AT_ONCE])["input_ids"]
        parts.append(np.fromiter(chain.from_iterable(d + end for d in documents), dtype=np.int64))
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    count = len(tokens) // block_size
    if count == 0:
        raise DataError(
            f"{table.name}, column {column!r}: {len(tokens)} tokens, too few for one block of {block_size}; "
            f"give more text or set block-size to {max(2, len(tokens))} or less"
        )
    blocks = tokens[: count * block_size].reshape(count, block_size)
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _pairs(
    table: Table, tokenizer: PreTrainedTokenizerBase, block_size: int, loss_on: str, columns: TextOptions
) -> Dataset:
    prompts, answers = table.text(columns.prompt), _answers(table, columns)
    for row, answer in enumerate(answers):
        if not answer.strip():
            raise DataError(f"{table.where(row)}, column {columns.answer!r}: the answer is empty, must be text")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        context, target = encode_pair(tokenizer, prompt, answer, max_tokens=block_size)
        if len(context) + len(target) < 2:
            raise DataError(
                f"{table.where(row)}, column {columns.prompt!r}: prompt and answer make one token, "
                "nothing can be predicted; write a prompt"
            )
        rows["input_ids"].append(context + target)
        rows["labels"].append((context if loss_on == "all" else [IGNORE] * len(context)) + target)
    return Dataset.from_dict(rows)


def _answers(table: Table, columns: TextOptions) -> list[str]:
    if columns.choices not in table.columns:
        return table.text(columns.answer)
    named = ChoiceColumns(columns.prompt, columns.choices, columns.answer)
    return [question.right for question in read_questions(table, named)]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer, the same for training and for scoring.

    The two are tokenised as one text, since that is what a model reads; a token that crosses the seam belongs to the
    answer. The answer is set off by a space unless either side brings white space. Where ``max_tokens`` is too small,
    the prompt loses its beginning; only an answer that alone is longer loses its end.

    >>> encode_pair(tokenizer, "2 + 2 =", "4")            # doctest: +SKIP
    ([50, 1343, 362, 796], [604])
    """
    seam = prompt[-1:] + answer[:1]
    gap = "" if not prompt or any(c.isspace() for c in seam) else " "
    whole = prompt + gap + answer
    if tokenizer.is_fast:
        encoded = _tokens(tokenizer, [whole], return_offsets_mapping=True)
        ids = list(encoded["input_ids"][0])
        cut = sum(end <= len(prompt) for _, end in encoded["offset_mapping"][0])
    else:
        ids = list(_tokens(tokenizer, [whole])["input_ids"][0])
        cut = len(_tokens(tokenizer, [prompt.rstrip()])["input_ids"][0])
    begin = _begin(tokenizer)
    context, target = ids[:cut], ids[cut:]
    if max_tokens is not None:
        target = target[: max_tokens - len(begin)]
        room = max_tokens - len(begin) - len(target)
        context = context[max(0, len(context) - room) :]
    return begin + context, target


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-sequence token if this tokenizer puts one before every text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    starts = tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return [int(tokenizer.bos_token_id)] if starts else []


def split_examples(examples: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Hold back ``share`` of the examples for validation, at least one; None for a share of 0.

    Disjoint in content too: all copies of an example land on the same side.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"validation-share must lie in [0, 1), got {share}")
    if share == 0:
        return examples, None
    copies: dict[tuple[int, ...] | bytes, list[int]] = {}
    for row, content in enumerate(contents_of(examples)):
        copies.setdefault(content, []).append(row)
    groups = list(copies.values())
    if len(groups) < 2:
        raise DataError(f"{len(groups)} distinct example can't be split into training and validation; give more data")
    order = np.random.default_rng(seed).permutation(len(groups))
    held = min(len(groups) - 1, max(1, round(share * len(groups))))
    validation, train = (sorted(chain.from_iterable(groups[i] for i in part)) for part in (order[:held], order[held:]))
    return examples.select(train), examples.select(validation)
