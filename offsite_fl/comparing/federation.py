"""One cell as a federation: the strategy around its bundle, on the simulated clients."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from offsite_fl.comparing import client_app
from offsite_fl.comparing.bench import Bench
from offsite_fl.comparing.cells import Cell
from offsite_fl.comparing.division import mixture, read_holdings
from offsite_fl.comparing.ordered import OrderedGrid
from offsite_fl.comparing.results import PEAK, Measured
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.strategies import OffsiteTuning, central_evaluation
from offsite_fl.strategies.named import make_strategy


def seed_everything(seed: int) -> None:
    """What the server draws at random: Flower samples clients with ``random``, its privacy wrappers use numpy."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def federate(grid: Grid, bench: Bench, cell: Cell, key: str) -> Measured:
    """All rounds of a cell, measured after each, and the last plug-in by domain."""
    condition, places = cell.condition, bench.places
    data = places.data(cell)
    if data is None or condition.clients is None or condition.fraction is None:
        raise OffsiteError(f"a federation needs a partition, clients and a fraction: {cell.label}")
    seed_everything(cell.seed)
    measure = bench.measure(cell)
    base = make_strategy(
        cell.arm.strategy,
        fraction_train=condition.fraction,
        fraction_evaluate=0.0,  # measured on the server, where all cells have the same test text
        min_train_nodes=max(1, int(condition.fraction * condition.clients)),
        min_available_nodes=condition.clients,
    )
    strategy = OffsiteTuning(
        base,
        measure.owner,
        codec=places.settings.grid.codec,
        tune=places.tune(cell),
        public=places.settings.data.file(places.settings.data.public),
        progress=False,
    )
    config = ConfigRecord(cell_config(places.settings, cell, data))  # type: ignore[arg-type]
    every = min(places.settings.test.every, places.settings.grid.rounds)
    strategy.start(
        OrderedGrid(grid, condition.clients, strategy.bundle.digest, {client_app.STATE: str(places.state(key))}),
        num_rounds=places.settings.grid.rounds,
        train_config=config,
        evaluate_config=config,
        evaluate_fn=central_evaluation(measure, strategy.lora, every=every, patch=lambda: strategy.patch),
    )
    shutil.rmtree(places.state(key), ignore_errors=True)  # nobody goes on from it
    check_rounds(strategy.history)
    update = strategy.update()
    by_domain = bench.by_domain(measure.owner, update.tensors, update.lora)
    held = read_holdings(data)
    return Measured(
        key,
        cell,
        rounds=tuple(strategy.history),
        ledger=Ledger(entry for entry in strategy.ledger if entry.kind != "bundle"),
        by_domain=by_domain,
        by_client={name: mixture(own, by_domain) for name, own in held.items()} if by_domain else {},
        bundle_bytes=strategy.bundle.total_bytes,
        peak_bytes=peak_of(strategy.history),
        tokens=measure.tokens,
    )


def cell_config(settings: GridSettings, cell: Cell, data: Path) -> dict[str, str | int]:
    """What a message says about its cell: read by :func:`client_app.with_cell`."""
    found: dict[str, str | int] = {client_app.DATA: str(data)}
    if cell.condition.attack:
        found[client_app.ATTACK] = cell.condition.attack
        found[client_app.ATTACKERS] = settings.grid.attackers_text
        found[client_app.PACKAGE] = settings.grid.attack_package
        found[client_app.MODEL] = settings.model.source()
        tune = settings.tune_of(cell.arm.strategy, cell.seed)
        found[client_app.CELL + "block-size"] = tune.block_size
        found[client_app.CELL + "loss-on"] = tune.loss_on
    return found


def check_rounds(history: list[RoundRecord]) -> None:
    """``OffsiteError`` if no round brought anything: such a cell has no result, only an untuned adapter."""
    rounds = [entry for entry in history if entry.round > 0]
    if rounds and all(entry.skipped for entry in rounds):
        reasons = [f"{reply.node}: {reply.reason}" for entry in rounds for reply in entry.dropped]
        raise OffsiteError(f"no round had enough good replies; {reasons[0] if reasons else 'nobody answered'}")


def peak_of(history: list[RoundRecord]) -> int | None:
    """The most that any client reported in any round."""
    found = [metrics[PEAK] for entry in history for metrics in entry.clients.values() if PEAK in metrics]
    return int(max(found)) if found else None
