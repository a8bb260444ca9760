"""The model owner: makes the bundle, runs the federation around it, and reports the five rows."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from offsite_fl.apps import (
    Clock,
    Work,
    five_rows,
    make_strategy_for,
    open_bundle,
    seed_everything,
    sums_by_client,
    track,
    tracking_for,
)
from offsite_fl.evaluation.choices import MultipleChoice
from offsite_fl.evaluation.record import RunReport, versions
from offsite_fl.evaluation.rows import FiveRows, Row, noun, show
from offsite_fl.evaluation.tables import print_report
from offsite_fl.evaluation.tracking import final_values
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.repair import Repair
from offsite_fl.strategies import FedPer, OffsiteTuning, central_evaluation
from quickstart.attack import threat_of
from quickstart.settings import Settings

app = ServerApp()
console = Console()
# What the rows are measured on, as the beginning of a sentence.
MEASURED = {
    "loss": "Perplexities are on held-out works",
    "accuracy": "Accuracies are shares of right answers (the likeliest of the choices) on held-out questions",
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the federation, from the full model to the report."""
    settings, clock = Settings.of(context.run_config), Clock(console)
    threat_of(context.run_config)  # an attack that can't be carried out ends the run here, not its rounds
    folder = Path(settings.run.folder).absolute()
    tracking = tracking_for(settings.run, context.run_config)
    seed_everything(settings.main.seed)
    with clock("opening the model"):
        owner = ModelOwner.from_pretrained(settings.main.model_path(), Split.parse(settings.main.split))
    with clock("making the bundle"):
        open_bundle(
            owner,
            settings.main,
            settings.run,
            calibration=settings.data.file("public", ".txt"),
            calibration_tokens=settings.main.calibration_tokens,
            block_size=settings.tune.block_size,
        )
    measure = measure_of(owner, settings)
    public = settings.data.file("public", ".txt")
    strategy = make_strategy_for(owner, settings.main, settings.tune, settings.run, public)
    track(strategy, tracking)
    with clock("federated tuning"):
        strategy.start(
            grid,
            num_rounds=settings.main.num_server_rounds,
            evaluate_fn=central_evaluation(
                measure, strategy.lora, every=settings.test.every, patch=lambda: strategy.patch
            ),
        )
    measure.use_patch(strategy.patch)
    repair = None
    if settings.repair.run:
        with clock("measuring the repair on public text"):
            repair = measured_repair(owner, strategy, settings)
            repair.save(folder / "repair.safetensors")
    with clock("full fine-tuning, the upper bound"):
        full_fine_tuning = upper_bound(measure, strategy, settings) if settings.baseline.run else None
    update = strategy.update()
    rows = five_rows(strategy, measure, full_fine_tuning, repair)
    tracking.log(final_values(rows), settings.main.num_server_rounds)
    tracking.close()
    owner.plug_in(update, repair)
    update.save(folder / "update.safetensors")
    if settings.run.save_model:
        owner.save(folder / "adapted")
    report = record(rows, strategy, measure, settings, clock, dict(context.run_config))
    if repair is not None:
        report = replace(report, notes=[*report.notes, repair.note, without_repair(strategy)])
    report.write(folder)
    print_report(report, console)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def measure_of(owner: ModelOwner, settings: Settings) -> Measure:
    """What the rows are measured by: the loss on held-out text, or the share of held-out questions that are right."""
    test, tune, score = settings.data.file("test"), settings.tune, None
    if settings.test.measure == "accuracy":
        size, count = tune.block_size, settings.test.examples(tune.block_size)
        score = MultipleChoice(test, owner.tokenizer, block_size=size, batch_size=16, max_questions=count)
    return Measure(
        owner,
        test,
        block_size=tune.block_size,
        max_tokens=settings.test.tokens,
        loss_on=tune.loss_on,
        score=score,
    )


def work_of(strategy: OffsiteTuning, settings: Settings) -> Work:
    """What the federation did; pairs of prompt and answer don't fill their blocks, so steps tell how many they were."""
    tune = settings.tune
    return Work.of(
        strategy.history,
        settings.data.owners,
        examples=lambda metrics: metrics.get("steps", 0) * tune.batch_size * tune.gradient_accumulation,
    )


def upper_bound(measure: Measure, strategy: OffsiteTuning, settings: Settings) -> Row:
    """Full fine-tuning on pooled data with the federation's optimiser steps and tokens."""
    work = work_of(strategy, settings)
    config = work.pooled(settings.tune, settings.baseline.lr)
    return measure.full_fine_tuning([settings.data.file(owner) for owner in work.owners], config)


def measured_repair(owner: ModelOwner, strategy: OffsiteTuning, settings: Settings) -> Repair:
    """What as many steps as the busiest data owner took repair in the emulator, on the public text."""
    steps = work_of(strategy, settings).steps
    # The public text has no answers, whatever is tuned.
    config = replace(
        settings.tune, max_steps=steps, schedule_steps=steps, schedule_offset=0, loss_on="all", progress=True
    )
    public = settings.data.file("public", ".txt")
    return owner.measure_repair(public, config, share=settings.repair.share, scale=settings.repair.scale)


def without_repair(strategy: OffsiteTuning) -> str:
    """The last round's plug-in as it came, for whoever wants to compare."""
    row = strategy.history[-1].plug_in
    said = f"its {noun(row)} was {show(row)}" if row is not None else "it wasn't measured"
    return f"The curves show the plug-in with the repair still in it; after the last round {said}."


def record(
    rows: FiveRows, strategy: OffsiteTuning, measure: Measure, settings: Settings, clock: Clock, config: dict[str, Any]
) -> RunReport:
    """Everything worth keeping of the run."""
    owner, bundle = strategy.owner, strategy.bundle
    report = asdict(owner.report) if owner.report else {}
    return RunReport(
        rows=rows,
        ledger=strategy.ledger,
        rounds=strategy.history,
        config=config,
        versions=versions(),
        seeds={"run": settings.main.seed},
        seconds=clock.seconds,
        emulator={"spec": owner.emulator, **report, "bundle_bytes": bundle.bytes_by_kind()},
        data={
            "held-out test": {"tokens": measure.tokens, **asked(measure, settings)},
            "calibration (public)": {"tokens": settings.main.calibration_tokens},
            **{
                owner: {"tokens tuned on": tokens}
                for owner, tokens in sums_by_client(strategy.history, "tokens").items()
            },
        },
        notes=notes(strategy, settings) + chance(measure, settings),
    )


def asked(measure: Measure, settings: Settings) -> dict[str, int]:
    """How many questions the accuracies rest on; nothing where losses are measured."""
    if settings.test.measure != "accuracy":
        return {}
    return {"questions": measure.examples}


def chance(measure: Measure, settings: Settings) -> list[str]:
    """How far an accuracy on so many questions can be off."""
    return [
        f"An accuracy on {count} questions has a standard error of up to {50 / math.sqrt(count):.1f} points."
        for count in asked(measure, settings).values()
    ]


def notes(strategy: OffsiteTuning, settings: Settings) -> list[str]:
    """What a reader of the numbers must know."""
    found = [f"{MEASURED[settings.test.measure]} of the data owners' kinds, never tuned on. One seed."]
    work = work_of(strategy, settings)
    if settings.baseline.run:
        found.append(
            f"Full fine-tuning had the federation's {work.steps} sequential optimiser steps of {work.examples} "
            f"examples, on the pooled data of {', '.join(work.owners)}, at lr {settings.baseline.lr:g}."
        )
    if isinstance(strategy.base, FedPer):
        found.append(strategy.base.note)
    if set(work.owners) < set(settings.data.owners):
        found.append(
            f"Only {len(work.owners)} of {len(settings.data.owners)} data owners took part, but the test is on all "
            "their kinds of text: simulate as many nodes as there are owners."
        )
    return found
