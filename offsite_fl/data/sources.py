"""Data files as tables. Whatever is wrong with a file is told with its name, line and column.

The readers are written out for ``.jsonl`` and ``.csv`` because the libraries' own errors don't name the line, which is
what a data owner needs to repair a file that nobody else may see.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (  # type: ignore[import-untyped,unused-ignore]
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
)

from offsite_fl.errors import DataError
from offsite_fl.registry import near

Source: TypeAlias = str | Path | Dataset


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where their rows came from.

    ``classes``: for columns of numbers that stand for classes, the names of those, where dataset or file tells them.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """Place of a row for an error message: a line (from 1) where the file has lines, else a row (from 0)."""
        return f"{self.name}, line {self.lines[row]}" if self.lines is not None else f"{self.name}, row {row}"

    def text(self, column: str) -> list[str]:
        """The values of a column, all text; ``DataError`` names the first that isn't."""
        values = list(self.columns[column])
        for row, value in enumerate(values):
            if not isinstance(value, str):
                # Its place and type, never the value: messages end up in logs, and data are private.
                found = "missing" if value is None else f"a value of type {type(value).__name__}"
                raise DataError(f"{self.where(row)}, column {column!r}: {found}, must be text")
        return values


def load_source(source: Source) -> Dataset:
    """Open a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file as a dataset; a dataset stays as it is.

    A ``.txt`` file is one document in the column ``text``. ``.json`` holds a list of objects or an object of lists.

    Raises
    ------
    DataError
        The file is missing, empty, unreadable or of another kind; the message names file and line.
    """
    if isinstance(source, Dataset):
        return source
    table = read_table(source)
    try:
        return Dataset.from_dict({name: list(values) for name, values in table.columns.items()})
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(f"{table.name}: a column mixes values of several types: {error}") from error


def class_names(source: Dataset) -> dict[str, Sequence[str]]:
    """The names of the classes in each column of a dataset that has them."""
    return {name: kind.names for name, kind in source.features.items() if isinstance(kind, ClassLabel)}


def read_table(source: Source) -> Table:
    """Like :func:`load_source`, but rows keep their line numbers for later messages."""
    if isinstance(source, Dataset):
        table = Table("dataset", {name: source[name] for name in source.column_names}, classes=class_names(source))
    elif isinstance(source, (DatasetDict, IterableDatasetDict)):
        raise DataError(f"a dataset of several splits was given; pass one of them: {', '.join(map(str, source))}")
    elif isinstance(source, IterableDataset):
        raise DataError("a streaming dataset was given, its length isn't known; load it without streaming")
    elif isinstance(source, (str, Path)):
        table = _read_file(Path(source))
    else:
        raise DataError(f"data must be a file or a datasets.Dataset, got {type(source).__name__}")
    if len(table) == 0:
        raise DataError(f"{table.name} is empty: it holds no rows")
    return table


def _read_file(path: Path) -> Table:
    if path.is_dir():
        raise DataError(f"data file {path} is a folder; name one of the files in it")
    if not path.is_file():
        raise DataError(f"data file {path} doesn't exist")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data file {path} is of an unknown kind {path.suffix!r}; {near(path.suffix, READERS)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data file {path} can't be read: {error.strerror or error}") from error
    if not content.strip():
        raise DataError(f"data file {path} is empty")
    return reader(path, content)


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        byte = content[error.start]
        raise DataError(
            f"{path}, line {line}, column {column}: byte 0x{byte:02x} isn't UTF-8; save it as UTF-8"
        ) from error


def _read_txt(path: Path, content: bytes) -> Table:
    return Table(str(path), {"text": [_decode(path, content)]}, [1])


def _parse_json(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{where}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise DataError(f"{path}, line {line}: not JSON that can be read: {type(error).__name__}") from error


def _read_jsonl(path: Path, content: bytes) -> Table:
    rows, lines = [], []
    # Not splitlines(): JSON text may hold other line separators (U+2028) unescaped.
    for number, line in enumerate(_decode(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(path, line, number)
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: each line must be an object like {{"text": "..."}}')
        rows.append(row)
        lines.append(number)
    return Table(str(path), _to_columns(rows), lines)


def _read_json(path: Path, content: bytes) -> Table:
    data = _parse_json(path, _decode(path, content))
    if isinstance(data, list):
        for number, row in enumerate(data):
            if not isinstance(row, dict):
                raise DataError(f'{path}, row {number}: each entry must be an object like {{"text": "..."}}')
        return Table(str(path), _to_columns(data))
    if isinstance(data, dict) and data and all(isinstance(column, list) for column in data.values()):
        lengths = {name: len(column) for name, column in data.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{path}: columns must be of equal length, found {lengths}")
        return Table(str(path), data)
    raise DataError(f"{path}, line 1: must be a list of objects, or an object whose values are lists (columns)")


def _to_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(path: Path, content: bytes) -> Table:
    text = _decode(path, content)
    limit = csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a chapter
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not CSV: {error}; text with commas or quotes goes in quotes") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"data file {path} is empty: it holds no rows")
    header = rows[0]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"{path}, line 1: column {doubled[0]!r} appears twice in the header")
    for line, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(header):
            hint = "text with commas goes in quotes"
            raise DataError(f"{path}, line {line}: {len(row)} fields, the header has {len(header)}; {hint}")
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else ([] for _ in header)
    return Table(str(path), {name: list(column) for name, column in zip(header, columns, strict=True)}, lines[1:])


def _read_parquet(path: Path, content: bytes) -> Table:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} isn't a readable parquet file: {error}") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(str(path), columns, classes=_stored_class_names(path, table.schema))


def _stored_class_names(path: Path, schema: pa.Schema) -> dict[str, Sequence[str]]:
    """What the library datasets writes about its columns into a parquet file; no other file has it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: told["names"] for name, told in features.items() if told.get("_type") == "ClassLabel"}
    except KeyError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: what it tells about its columns can't be read: {type(error).__name__}") from error


READERS: dict[str, Callable[[Path, bytes], Table]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
"""File endings and what reads them; a new kind of file is one function and one row."""
