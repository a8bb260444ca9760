"""The cells that a grid is set against and that are no federation. They get as many steps and tokens as one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

from offsite_fl.choosing.peak import peak_memory
from offsite_fl.comparing.bench import Bench
from offsite_fl.comparing.cells import Cell, Role
from offsite_fl.comparing.division import client_name, mixture, read_holdings
from offsite_fl.comparing.federation import peak_of, seed_everything
from offsite_fl.comparing.places import whole_run
from offsite_fl.comparing.results import PEAK, SECONDS, Measured
from offsite_fl.config import TuneConfig
from offsite_fl.data.sources import Source
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.evaluation.rows import Row
from offsite_fl.measure import Measure
from offsite_fl.update import Update
from offsite_fl.wire.settings import client_seed

POOLED = "everyone"


def zero_shot(bench: Bench, cell: Cell, key: str) -> Measured:
    """The full model as it is."""
    measure = bench.measure(cell)
    row = measure.full_zero_shot()
    return Measured(
        key,
        cell,
        rounds=(RoundRecord(0, plug_in=row),),
        by_domain=bench.by_domain(measure.owner, None),
        tokens=measure.tokens,
    )


def alone(bench: Bench, cell: Cell, key: str) -> Measured:
    """Each client tunes its own adapter and plugs it in alone; losses are means over clients.

    Every client does as many steps as in all rounds of the federation.
    """
    data, clients = bench.places.data(cell), cell.condition.clients
    if data is None or clients is None:
        raise OffsiteError(f"clients on their own need a partition: {cell.label}")
    measure, held = bench.measure(cell), read_holdings(data)
    tune = whole_run(bench.places.tune(cell), bench.settings.grid.rounds)
    owner = DataOwner.open(bench.places.bundle(cell), tune.frozen_dtype, tune.device)
    metrics: dict[str, dict[str, float]] = {}
    ledger, rows, domains, own = Ledger(), [], [], {}
    for name in map(client_name, range(clients)):
        owner.reset()
        config = dataclasses.replace(tune, seed=client_seed(cell.seed, 0, name))
        update, metrics[name] = _tuned(owner, data / f"{name}.jsonl", config)
        ledger.add(1, "update", "up", name, _bytes_of(update))
        rows.append(_rows(measure, update))
        domains.append(bench.by_domain(measure.owner, update.tensors, update.lora))
        if domains[-1]:
            own[name] = mixture(held[name], domains[-1])
    plug_in, emulator = (Row(loss=statistics.fmean([row[i] for row in rows])) for i in (0, 1))
    by_domain = {domain: statistics.fmean([losses[domain] for losses in domains]) for domain in domains[0]}
    return _done(bench, cell, key, measure, RoundRecord(1, plug_in, emulator, metrics), ledger, by_domain, own)


def pooled(bench: Bench, cell: Cell, key: str) -> Measured:
    """One data owner with everybody's rows tunes the same bundle.

    A round of n clients with s steps of b examples each has s sequential steps over n * b examples; so does this.
    """
    measure = bench.measure(cell)
    config = _side_by_side(bench, cell)
    owner = DataOwner.open(bench.places.bundle(cell), config.frozen_dtype, config.device)
    rows = measure.pooled(list(bench.settings.data.owner_files()))
    update, metrics = _tuned(owner, rows, config)
    ledger = Ledger()
    ledger.add(1, "update", "up", POOLED, _bytes_of(update))
    plug_in, emulator = (Row(loss=loss) for loss in _rows(measure, update))
    by_domain = bench.by_domain(measure.owner, update.tensors, update.lora)
    return _done(bench, cell, key, measure, RoundRecord(1, plug_in, emulator, {POOLED: metrics}), ledger, by_domain)


def full_fine_tuning(bench: Bench, cell: Cell, key: str) -> Measured:
    """Every parameter of a copy of the full model tuned on everybody's rows: the upper bound. Nothing is handed out."""
    measure, config = bench.measure(cell), _side_by_side(bench, cell)
    started = time.perf_counter()
    with peak_memory(str(measure.device)) as peak:
        row = measure.full_fine_tuning(list(bench.settings.data.owner_files()), config)
    metrics = {SECONDS: time.perf_counter() - started}
    if peak.bytes is not None:
        metrics[PEAK] = peak.bytes
    return dataclasses.replace(
        _done(bench, cell, key, measure, RoundRecord(1, row, None, {POOLED: metrics}), Ledger(), {}), bundle_bytes=0
    )


def _side_by_side(bench: Bench, cell: Cell) -> TuneConfig:
    """The steps of one client, each over the examples of all."""
    tune = whole_run(bench.places.tune(cell), bench.settings.grid.rounds)
    clients = cell.condition.clients or 1
    if tune.max_steps is None:  # epochs over everybody's rows are the same epochs
        return tune
    return dataclasses.replace(tune, gradient_accumulation=tune.gradient_accumulation * clients)


def _tuned(owner: DataOwner, source: Source, config: TuneConfig) -> tuple[Update, dict[str, float]]:
    with peak_memory(str(next(owner.model.parameters()).device)) as peak:
        update = owner.tune(source, config)
    metrics = {name.replace("-", "_"): float(value) for name, value in update.metrics.items()}
    return update, metrics | ({} if peak.bytes is None else {PEAK: float(peak.bytes)})


def _rows(measure: Measure, update: Update) -> tuple[float, float]:
    rows = measure.plug_in(update.tensors, update.lora), measure.emulator_tuned(update.tensors, update.lora)
    return rows[0].value, rows[1].value


def _done(
    bench: Bench,
    cell: Cell,
    key: str,
    measure: Measure,
    after: RoundRecord,
    ledger: Ledger,
    by_domain: Mapping[str, float],
    by_client: Mapping[str, float] | None = None,
) -> Measured:
    after.round = bench.settings.grid.rounds
    before = RoundRecord(0, plug_in=measure.full_zero_shot(), emulator=measure.emulator_zero_shot())
    bundle = measure.owner.bundle
    moved = Ledger(dataclasses.replace(entry, round=after.round) for entry in ledger)
    return Measured(
        key,
        cell,
        rounds=(before, after),
        ledger=moved,
        by_domain=dict(by_domain),
        by_client=dict(by_client or {}),
        bundle_bytes=bundle.total_bytes if bundle is not None else 0,
        peak_bytes=peak_of([after]),
        tokens=measure.tokens,
    )


def _bytes_of(update: Update) -> int:
    return sum(4 * value.numel() for value in update.tensors.values())


REFERENCES: dict[Role, Callable[[Bench, Cell, str], Measured]] = {
    "zero-shot": zero_shot,
    "alone": alone,
    "pooled": pooled,
    "full-fine-tuning": full_fine_tuning,
}


def refer(bench: Bench, cell: Cell, key: str) -> Measured:
    """Measure a reference that is no federation."""
    seed_everything(cell.seed)
    return REFERENCES[cell.arm.role](bench, cell, key)
