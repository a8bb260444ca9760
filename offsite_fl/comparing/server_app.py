"""One Flower run works through many cells: starting the simulation takes longer than a small federation does."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from offsite_fl.comparing.bench import Bench
from offsite_fl.comparing.cells import Cell
from offsite_fl.comparing.federation import federate
from offsite_fl.comparing.references import REFERENCES, refer
from offsite_fl.comparing.results import Measured, cell_to_dict, read_cell
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.lines import append_line
from offsite_fl.evaluation.record import replace_file

log = logging.getLogger("flwr.offsite")
app = ServerApp()


@dataclass(frozen=True)
class Plan:
    """What one Flower run has to do: ``grid`` are the tables of GRID.toml, ``results`` is where lines go."""

    grid: dict[str, Any]
    out: Path
    results: Path
    threads: int
    cells: tuple[tuple[str, Cell], ...]

    def write(self, path: Path) -> None:
        """Put it where the run config's ``plan`` says."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {
            "grid": self.grid,
            "out": str(self.out),
            "results": str(self.results),
            "threads": self.threads,
            "cells": [{"key": key, **cell_to_dict(cell)} for key, cell in self.cells],
        }
        replace_file(path, json.dumps(table, indent=1))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what :meth:`write` wrote."""
        table = checks.entries(json.loads(path.read_text(encoding="utf-8")), str(path), cls.__dataclass_fields__)
        listed = checks.items(table["cells"], "cells")
        cells = tuple((str(entry["key"]), read_cell(entry, f"cells[{i}]")) for i, entry in enumerate(listed))
        return cls(table["grid"], Path(table["out"]), Path(table["results"]), int(table["threads"]), cells)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Every cell of the plan; one that fails is recorded and doesn't end the others."""
    plan = Plan.read(Path(str(context.run_config["plan"])))
    torch.set_num_threads(plan.threads)
    bench = Bench(GridSettings.of(plan.grid), plan.out)
    for number, (key, cell) in enumerate(plan.cells, start=1):
        log.info("cell %d of %d: %s", number, len(plan.cells), cell.label)
        append_line(plan.results, measured(grid, bench, cell, key))


def measured(grid: Grid, bench: Bench, cell: Cell, key: str) -> Measured:
    """The cell's numbers, or what went wrong."""
    started = time.perf_counter()
    try:
        found = refer(bench, cell, key) if cell.arm.role in REFERENCES else federate(grid, bench, cell, key)
    except Exception as error:  # whatever a strategy raises, a bug of its own included; an interruption passes
        log.warning("%s failed: %s\n%s", cell.label, error, traceback.format_exc())
        found = Measured(key, cell, error=reason(error))
    return dataclasses.replace(found, seconds=round(time.perf_counter() - started, 3))


def reason(error: Exception) -> str:
    """One line of what went wrong; of what isn't the project's own error also the kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OffsiteError):
        return text
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"
