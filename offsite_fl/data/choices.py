"""Multiple choice: rows of a prompt, its choices, and which of them is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offsite_fl.data.sources import Source, Table, read_table
from offsite_fl.errors import DataError
from offsite_fl.registry import near


@dataclass(frozen=True)
class ChoiceColumns:
    """Names of the columns of a multiple-choice table."""

    prompt: str = "prompt"
    choices: str = "choices"
    answer: str = "answer"


@dataclass(frozen=True)
class Question:
    """A prompt with at least two different choices; ``answer`` is the index of the right one, from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def right(self) -> str:
        """The text of the right choice: what is tuned on."""
        return self.choices[self.answer]


def read_questions(source: Source | Table, columns: ChoiceColumns | None = None) -> list[Question]:
    """The questions of a ``.jsonl``, ``.json`` or ``.parquet`` file, or of a dataset, in their order.

    ``choices`` is a list of texts; ``answer`` is an index into it, from 0, or the right choice's own text.

    Raises
    ------
    DataError
        A column is missing, or a row holds no question; file, line and column are named, never what is written there.
    """
    columns = columns or ChoiceColumns()
    table = source if isinstance(source, Table) else read_table(source)
    for name in (columns.prompt, columns.choices, columns.answer):
        if name not in table.columns:
            raise DataError(f"{table.name}: multiple choice needs a column {name!r}: {near(name, table.columns)}")
    prompts = table.text(columns.prompt)
    found = []
    for row, (prompt, listed, answer) in enumerate(
        zip(prompts, table.columns[columns.choices], table.columns[columns.answer], strict=True)
    ):
        choices = _choices(listed, f"{table.where(row)}, column {columns.choices!r}")
        found.append(Question(prompt, choices, _index(answer, choices, table.where(row), columns.answer)))
    return found


def _choices(listed: Any, where: str) -> tuple[str, ...]:
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise DataError(f"{where}: a value of type {type(listed).__name__}, must be a list of texts")
    for number, choice in enumerate(listed):
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{where}: choice {number} is empty or no text, each must be text")
    if len(listed) < 2 or len({choice.strip() for choice in listed}) < len(listed):
        raise DataError(f"{where}: {len(listed)} choices, must be at least two that differ")
    return tuple(listed)


def _index(answer: Any, choices: tuple[str, ...], row: str, column: str) -> int:
    where = f"{row}, column {column!r}"
    if isinstance(answer, str):
        if answer not in choices:
            raise DataError(f"{where}: the answer is none of the {len(choices)} choices, must be one of their texts")
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise DataError(f"{where}: a value of type {type(answer).__name__}, must be an index from 0 or a choice's text")
    if not 0 <= answer < len(choices):
        raise DataError(f"{where}: index {answer} is outside the {len(choices)} choices, which count from 0")
    return answer
