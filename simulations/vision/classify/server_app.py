"""The model owner: makes the bundle, runs the federation around it, and reports the five rows in accuracy."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from classify.model import classifier_owner
from classify.scoring import Scored, samples_of
from classify.settings import LABEL, Settings, owner_name
from offsite_fl.apps import (
    Clock,
    Work,
    five_rows,
    make_strategy_for,
    open_bundle,
    seed_everything,
    track,
    tracking_for,
)
from offsite_fl.evaluation.record import RunReport, versions
from offsite_fl.evaluation.rows import FiveRows, Row
from offsite_fl.evaluation.tables import print_report
from offsite_fl.evaluation.tracking import final_values
from offsite_fl.strategies import OffsiteTuning, central_evaluation

app = ServerApp()
console = Console()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the federation, from the full model to the report."""
    settings, clock = Settings.of(context.run_config), Clock(console)
    folder, test = Path(settings.run.folder).absolute(), settings.data.rows("test")
    test = test.select(range(min(len(test), settings.test.examples)))
    tracking = tracking_for(settings.run, context.run_config)
    seed_everything(settings.main.seed)
    with clock("opening the model and making its head from public examples"):
        owner = classifier_owner(settings)
    public = settings.data.rows("public")
    with clock("making the bundle"):
        open_bundle(owner, settings.main, settings.run, calibration=public, block_size=settings.tune.block_size)
    scored = Scored(owner, test, settings.tune.block_size)
    leak = scored.measure.leak([public, *([settings.data.rows("train")] if settings.baseline.run else [])])
    strategy = make_strategy_for(owner, settings.main, settings.tune, settings.run, public)
    track(strategy, tracking)
    with clock("federated tuning"):
        evaluate = central_evaluation(
            scored.measure, strategy.lora, every=settings.test.every, patch=lambda: strategy.patch
        )
        strategy.start(grid, num_rounds=settings.main.num_server_rounds, evaluate_fn=evaluate)
    scored.measure.use_patch(strategy.patch)
    rows = five_rows(strategy, scored.measure, None)
    shown = test.select(range(min(len(test), settings.test.shown)))
    with clock("full fine-tuning, the upper bound"):
        best = upper_bound(scored, strategy, settings) if settings.baseline.run else None
    answers = scored.latest[: len(shown)] if best is not None else []
    rows = replace(rows, full_fine_tuning=best)
    tracking.log(final_values(rows), settings.main.num_server_rounds)
    tracking.close()
    samples = samples_of(owner, shown, strategy, settings.tune.block_size, answers)
    update = strategy.update()
    owner.plug_in(update)
    update.save(folder / "update.safetensors")
    if settings.run.save_model:
        owner.save(folder / "adapted")
    report = record(rows, strategy, settings, clock, context, leak)
    report.samples = samples
    report.data |= shares_of(strategy, settings, len(list(grid.get_node_ids())))
    report.write(folder)
    print_report(report, console)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def work_of(strategy: OffsiteTuning, settings: Settings) -> Work:
    """What the federation did; an owner's step goes through ``batch-size`` examples for each accumulated gradient."""
    each = settings.tune.batch_size * settings.tune.gradient_accumulation
    return Work.of(strategy.history, (), examples=lambda metrics: metrics.get("steps", 0) * each)


def upper_bound(scored: Scored, strategy: OffsiteTuning, settings: Settings) -> Row:
    """Full fine-tuning on everybody's rows with the federation's optimiser steps and examples."""
    config = work_of(strategy, settings).pooled(settings.tune, settings.baseline.lr)
    return scored.measure.full_fine_tuning([settings.data.rows("train")], config)


def shares_of(strategy: OffsiteTuning, settings: Settings, owners: int) -> dict[str, dict[str, Any]]:
    """How many rows of each class every simulated owner has; nothing where the owners are sites of their own."""
    seen = {name for entry in strategy.history for name in entry.clients}
    if not seen <= {owner_name(number) for number in range(owners)}:
        return {}
    shares = settings.data.shares(owners, settings.main.seed)
    return {owner_name(number): counted(rows[LABEL]) for number, rows in enumerate(shares)}


def counted(labels: list[str]) -> dict[str, int]:
    """Examples in all, and of each class."""
    return {"examples": len(labels), **dict(sorted(Counter(labels).items()))}


def record(
    rows: FiveRows, strategy: OffsiteTuning, settings: Settings, clock: Clock, context: Context, leak: str | None
) -> RunReport:
    """Everything worth keeping of the run; ``leak`` says which test examples somebody tuned on."""
    owner, bundle = strategy.owner, strategy.bundle
    made = asdict(owner.report) if owner.report else {}
    return RunReport(
        rows=rows,
        ledger=strategy.ledger,
        rounds=strategy.history,
        config=dict(context.run_config),
        versions=versions(),
        seeds={"run": settings.main.seed},
        seconds=clock.seconds,
        emulator={"spec": settings.main.emulator, **made, "bundle_bytes": bundle.bytes_by_kind()},
        data={
            "held-out test": counted(settings.data.rows("test")[LABEL][: settings.test.examples]),
            "public, with the model owner": counted(settings.data.rows("public")[LABEL]),
        },
        notes=notes(strategy, settings, leak),
    )


def notes(strategy: OffsiteTuning, settings: Settings, leak: str | None) -> list[str]:
    """What a reader of the numbers must know."""
    found = [
        f"{leak or 'Accuracy is on test examples that nobody tuned on.'} One seed.",
        "The untuned model has a head that the model owner made from the public examples: it answers the class whose "
        "mean is nearest. The head is tuned too, and travels with the adapter.",
    ]
    if settings.baseline.run:
        work = work_of(strategy, settings)
        found.append(
            f"Full fine-tuning had the federation's {work.steps} sequential optimiser steps of {work.examples} "
            f"examples, on everybody's data pooled, at lr {settings.baseline.lr:g}."
        )
    return found
