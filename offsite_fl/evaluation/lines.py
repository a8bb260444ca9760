"""Results as lines of JSON in a file, appended as they come: an interruption costs the one that was in work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from offsite_fl.errors import CheckpointError, DataError


class Keyed(Protocol):
    """One result: ``key`` stands for everything that its numbers depend on, ``error`` says why there are none."""

    @property
    def key(self) -> str:
        """Its name in the file."""

    @property
    def error(self) -> str | None:
        """What went wrong, if anything did."""

    def to_dict(self) -> dict[str, Any]:
        """JSON's own types."""


T = TypeVar("T", bound=Keyed)


class LineStore(Generic[T]):
    """A file of results. What it holds under a key isn't measured again, errors excepted.

    ``read`` makes a result of a line's object and raises ``DataError`` where that is none. ``CheckpointError`` names
    the line of the file.
    """

    def __init__(self, path: Path, read: Callable[[object], T]) -> None:
        self.path = path
        self._results = {result.key: result for result in read_lines(path, read)}

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> T | None:
        """The result with this key. One that failed counts as missing: its cause may be gone."""
        found = self._results.get(key)
        return None if found is None or found.error is not None else found

    def failed(self, key: str) -> T | None:
        """The result with this key if it failed."""
        found = self._results.get(key)
        return found if found is not None and found.error is not None else None

    def add(self, result: T) -> None:
        """Append a result; it is on disk when this returns."""
        append_line(self.path, result)
        self._results[result.key] = result


def append_line(path: Path, result: Keyed) -> None:
    """Append a result to a file, which is made if it isn't there; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result.to_dict(), allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, read: Callable[[object], T]) -> list[T]:
    """All whole lines; a last one that was cut off in writing is taken out of the file."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(read(json.loads(line)))
        except (ValueError, RecursionError, DataError) as error:
            raise CheckpointError(
                f"{path}, line {number} isn't a measured cell ({error}); give another --out, or remove the file"
            ) from error
    return found
