"""Cells on disk, one line each, appended as they come: an interruption costs the cell that was in work."""

from __future__ import annotations

from pathlib import Path

from offsite_fl.choosing.results import Cell
from offsite_fl.evaluation.lines import LineStore


class CellStore(LineStore[Cell]):
    """The file ``cells.jsonl``. What it holds under a key isn't measured again, errors excepted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Cell.from_dict)
