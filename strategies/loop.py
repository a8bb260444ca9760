"""The rounds of a run: train, aggregate, checkpoint, evaluate, checkpoint. Picks up where a checkpoint left off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import Result

from offsite_fl.errors import CheckpointError
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import RoundRecord

from . import snapshot
from .central import EMULATOR, PLUG_IN, EvaluateFn, row_of
from .checkpoint import Checkpoint, check_settings, check_unused, latest
from .journal import log
from .rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from .offsite_tuning import OffsiteTuning

ADAPTER = "adapter/"
METRICS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
Phase = Literal["trained", "done"]


@dataclass(frozen=True)
class Plan:
    """What the caller of ``start`` asked for."""

    num_rounds: int
    timeout: float
    train_config: ConfigRecord | None = None
    evaluate_config: ConfigRecord | None = None
    evaluate_fn: EvaluateFn | None = None


def run(strategy: OffsiteTuning, grid: Grid, plan: Plan) -> Result:
    """All rounds of ``plan`` that aren't in a checkpoint yet."""
    began = time.monotonic()
    result = Result(arrays=strategy.initial_arrays())
    done = _resume(strategy, result)
    strategy.summary()
    if done is None:
        strategy.history[:] = [RoundRecord(0)]
        _evaluate_server(strategy, result, plan, 0)
        _tell(strategy)
        first = 1
    else:
        first = done.round + 1
        if done.phase == "trained":
            _evaluate(strategy, grid, result, plan, done.round)
            _save(strategy, result, done.round, "done")
            _tell(strategy)
    for server_round in range(first, plan.num_rounds + 1):
        log.info("")
        log.info("[ROUND %s/%s]", server_round, plan.num_rounds)
        started = time.monotonic()
        try:
            _train(strategy, grid, result, plan, server_round)
        except PrivacyBudgetExhausted as stop:
            log.warning("the run ends before round %d: %s", server_round, stop)
            strategy.history.pop()
            break
        _save(strategy, result, server_round, "trained")
        _evaluate(strategy, grid, result, plan, server_round)
        strategy.history[-1].seconds = time.monotonic() - started
        _save(strategy, result, server_round, "done")
        _tell(strategy)
    log.info("")
    log.info("Strategy execution finished in %.2fs", time.monotonic() - began)
    return result


def _tell(strategy: OffsiteTuning) -> None:
    if strategy.on_round is not None:
        strategy.on_round(strategy.history[-1])


def _copy(config: ConfigRecord | None) -> ConfigRecord:
    # Strategies write into the record they get; the next round must begin with the caller's own.
    return ConfigRecord(dict(config or {}))


def _train(strategy: OffsiteTuning, grid: Grid, result: Result, plan: Plan, server_round: int) -> None:
    messages = strategy.configure_train(server_round, result.arrays, _copy(plan.train_config), grid)
    arrays, metrics = strategy.aggregate_train(server_round, strategy.waiting.exchange(grid, messages, plan.timeout))
    if arrays is not None:
        result.arrays = arrays
        strategy.state = strategy.tensors_of(arrays)
    if metrics is not None:
        log.info("\t└──> Aggregated MetricRecord: %s", metrics)
        result.train_metrics_clientapp[server_round] = metrics


def _evaluate(strategy: OffsiteTuning, grid: Grid, result: Result, plan: Plan, server_round: int) -> None:
    messages = strategy.configure_evaluate(server_round, result.arrays, _copy(plan.evaluate_config), grid)
    metrics = strategy.aggregate_evaluate(server_round, strategy.waiting.exchange(grid, messages, plan.timeout))
    if metrics is not None:
        log.info("\t└──> Aggregated MetricRecord: %s", metrics)
        result.evaluate_metrics_clientapp[server_round] = metrics
    _evaluate_server(strategy, result, plan, server_round)


def _evaluate_server(strategy: OffsiteTuning, result: Result, plan: Plan, server_round: int) -> None:
    if plan.evaluate_fn is None:
        return
    metrics = plan.evaluate_fn(server_round, _fresh(result.arrays))
    log.info("\t└──> Server evaluation: %s", metrics)
    if metrics is None:
        return
    result.evaluate_metrics_serverapp[server_round] = metrics
    record = strategy.history[-1]
    record.plug_in = row_of(metrics, PLUG_IN) or record.plug_in
    record.emulator = row_of(metrics, EMULATOR) or record.emulator


def _fresh(arrays: ArrayRecord) -> ArrayRecord:
    """A record of its own for foreign code, which may take arrays out of it."""
    return ArrayRecord(dict(arrays))


# Checkpoints ---------------------------------------------------------------------------------------------------


def _save(strategy: OffsiteTuning, result: Result, server_round: int, phase: Phase) -> None:
    if strategy.run_dir is None:
        return
    table, arrays = snapshot.take(strategy.base)
    arrays |= {ADAPTER + name: array.numpy() for name, array in result.arrays.items()}
    checkpoint = Checkpoint(
        round=server_round,
        phase=phase,
        settings=strategy.settings,
        strategy=table,
        rng=rng_state(),
        ledger=strategy.ledger.to_list(),
        rounds=[record.to_dict() for record in strategy.history],
        metrics={key: {str(r): dict(m) for r, m in getattr(result, key).items()} for key in METRICS},
        arrays=arrays,
    )
    checkpoint.save(strategy.run_dir, keep=strategy.keep_checkpoints)


def _resume(strategy: OffsiteTuning, result: Result) -> Checkpoint | None:
    """Put the last checkpoint's state into ``strategy`` and ``result``; None where the run begins at the beginning."""
    folder: Path | None = strategy.run_dir
    if folder is None:
        return None
    if not strategy.resume:
        check_unused(folder)
        return None
    found = latest(folder)
    if found is None:
        log.info("nothing to resume in %s: beginning with round 1", folder)
        return None
    check_settings(found.settings, strategy.settings)
    log.info("resuming after round %d from %s", found.round, folder)
    _apply(strategy, result, found)
    return found


def _apply(strategy: OffsiteTuning, result: Result, found: Checkpoint) -> None:
    adapter = {key.removeprefix(ADAPTER): value for key, value in found.arrays.items() if key.startswith(ADAPTER)}
    try:
        ordered = {name: adapter[name] for name in strategy.state}
    except KeyError as error:
        raise CheckpointError(f"the checkpoint lacks adapter tensor {error}") from error
    result.arrays = ArrayRecord({name: Array(value) for name, value in ordered.items()})
    strategy.state = strategy.tensors_of(result.arrays)
    snapshot.put(strategy.base, found.strategy, found.arrays)
    strategy.journal.ledger = Ledger.from_list(found.ledger)
    strategy.history[:] = [RoundRecord.from_dict(record) for record in found.rounds]
    for key in METRICS:
        getattr(result, key).update({int(r): MetricRecord(m) for r, m in found.metrics[key].items()})
    set_rng_state(found.rng)
