"""The classes of a classifier, and what a data file may call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offsite_fl.data.sources import Table
from offsite_fl.errors import DataError, ModelError
from offsite_fl.registry import near


@dataclass(frozen=True)
class Classes:
    """Names of the classes, in the order of the model's logits.

    >>> Classes(("cat", "dog")).index("dog", "pets.jsonl, line 3")
    1
    """

    names: tuple[str, ...]

    @classmethod
    def of_config(cls, config: Any) -> Classes:
        """From ``id2label`` of a transformers config; ``ModelError`` if it isn't a classifier's."""
        labels = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
        if sorted(labels) != list(range(len(labels))) or len(labels) < 2:
            raise ModelError(f"a classifier's config must name 2 classes or more in id2label, this one has {labels!r}")
        kind = getattr(config, "problem_type", None)
        if kind not in (None, "single_label_classification"):
            raise ModelError(f"a classifier of one class for each example is needed, this one is for {kind}")
        names = tuple(labels[index] for index in range(len(labels)))
        if len(set(names)) < len(names):
            raise ModelError("a classifier's classes must have different names in id2label")
        return cls(names)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, value: Any, where: str) -> int:
        """The class that ``value`` stands for: its name, or its number from 0, also written as text.

        ``DataError`` names ``where`` and the nearest names.
        """
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self):
            return value
        shown = ascii(value)[:60]
        raise DataError(
            f"{where}: {shown} is none of the model's {len(self)} classes, a name or a number from 0 to "
            f"{len(self) - 1}; {near(str(value), self.names)}"
        )

    def of_table(self, table: Table, column: str) -> list[int]:
        """The classes of a table's rows; ``DataError`` names the first row that has none."""
        if column not in table.columns:
            raise DataError(f"{table.name}: needs a column {column!r}; {near(column, table.columns)}")
        return [
            self.index(value, f"{table.where(row)}, column {column!r}")
            for row, value in enumerate(named_labels(table, column))
        ]


def named_labels(table: Table, column: str) -> Sequence[Any]:
    """The labels of a table: by name where it tells names of classes that aren't just numbers.

    What isn't a number stays as it is: a column may have been replaced, and the names of the old one be still there.
    """
    names, values = table.classes.get(column, ()), table.columns[column]
    if all(name.isdecimal() for name in names):
        return values
    known = dict(enumerate(names))
    return [known.get(value) if type(value) is int else value for value in values]
