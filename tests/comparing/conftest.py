"""Hand-made cells with numbers that are easy to reckon with."""

from __future__ import annotations

from typing import Any

import pytest

from offsite_fl.comparing.cells import Arm, Cell, Condition
from offsite_fl.comparing.results import Measured
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.evaluation.ledger import Ledger, LedgerEntry
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.evaluation.rows import Row


def grid_table(**axes: Any) -> dict[str, Any]:
    """The tables of a small grid: two strategies, one emulator, two partitions, two seeds."""
    grid = {
        "strategies": ["fedavg", "fedadam:eta=0.01"],
        "emulators": ["layer-drop:keep=2"],
        "partitions": ["iid", "natural"],
        "seeds": [0, 1],
        "clients": [2],
        "rounds": 2,
    }
    return {
        "model": {"path": "m", "split": "1-1"},
        "data": {"folder": "d", "owners": ["north", "south"]},
        "grid": {**grid, **axes},
        "tune": {"max-steps": 2},
        "baselines": {"run": ["zero-shot", "full-fine-tuning"]},
    }


@pytest.fixture
def settings() -> GridSettings:
    return GridSettings.of(grid_table())


def measured(
    arm: Arm,
    plug_in: float | None,
    *,
    partition: str | None = "iid",
    seed: int = 0,
    clients: int | None = 2,
    emulator_loss: float = 5.0,
    **more: Any,
) -> Measured:
    """A cell whose plug-in went from 4.0 to ``plug_in`` in two rounds; None: it failed."""
    federated = arm.role == "strategy"
    condition = Condition(
        partition if federated else None,
        clients if arm.role != "zero-shot" else None,
        1.0 if federated else None,
        "" if federated else None,
    )
    cell = Cell(arm, condition, seed)
    key = f"{arm} {condition} {seed}"
    if plug_in is None:
        return Measured(key, cell, error=more.get("error", "it broke"))
    rounds = [RoundRecord(0, Row(4.0), Row(6.0))]
    if arm.role != "zero-shot":
        for number, loss in ((1, (4.0 + plug_in) / 2), (2, plug_in)):
            clients_of = {name: {"seconds": 1.5, "peak_bytes": 100.0} for name in ("client-0", "client-1")}
            rounds.append(RoundRecord(number, Row(loss), Row(emulator_loss), clients_of))
    ledger = Ledger(
        LedgerEntry(n, kind, way, "client-0", size)  # type: ignore[arg-type]
        for n in (1, 2)
        for kind, way, size in (("adapter", "down", 10), ("update", "up", 7))
    )
    by_client = more.get("by_client", {"client-0": plug_in - 0.5, "client-1": plug_in + 0.5})
    return Measured(
        key, cell, tuple(rounds), ledger, {"north": 3.0}, by_client if federated else {}, 1000, 100, 64, 2.0
    )


FEDAVG, FEDADAM = (Arm("strategy", name, "layer-drop:keep=2") for name in ("fedavg", "fedadam:eta=0.01"))
ZERO, FULL = Arm("zero-shot"), Arm("full-fine-tuning")


def whole_grid(better: str = "fedavg") -> list[Measured]:
    """Every cell of :func:`grid_table`'s grid; one strategy is better by 0.1, 0.2, 0.3 and 0.4 in the four pairs."""
    cells = [measured(ZERO, 4.0), *(measured(FULL, 2.0, seed=seed) for seed in (0, 1))]
    pairs = [("iid", 0), ("iid", 1), ("natural", 0), ("natural", 1)]
    for number, (partition, seed) in enumerate(pairs, start=1):
        for arm in (FEDAVG, FEDADAM):
            loss = 3.0 if arm.strategy.startswith(better) else 3.0 + number / 10
            cells.append(measured(arm, loss, partition=partition, seed=seed))
    return cells
