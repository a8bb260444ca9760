"""Cells on disk, one line each, appended as they come: an interruption costs the cell that was in work."""

from __future__ import annotations

import json
import os
from pathlib import Path

from offsite_fl.choosing.results import Cell
from offsite_fl.errors import CheckpointError, DataError


class CellStore:
    """The file ``cells.jsonl``. What it holds under a key isn't measured again, errors excepted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells = {cell.key: cell for cell in _read(path)}

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, key: str) -> Cell | None:
        """The cell with this key. One that failed counts as missing: its cause may be gone."""
        cell = self._cells.get(key)
        return None if cell is None or cell.error is not None else cell

    def add(self, cell: Cell) -> None:
        """Append a cell; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(cell.to_dict(), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._cells[cell.key] = cell


def _read(path: Path) -> list[Cell]:
    """All whole lines; a last one that was cut off in writing is taken out of the file."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    cells = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            cells.append(Cell.from_dict(json.loads(line)))
        except (ValueError, RecursionError, DataError) as error:
            raise CheckpointError(
                f"{path}, line {number} isn't a measured cell ({error}); give another --out, or remove the file"
            ) from error
    return cells
