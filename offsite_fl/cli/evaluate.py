"""``offsite-fl evaluate``: the five rows of one update, measured by whoever holds the model and a test set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite_fl.cli.bundle import Model
from offsite_fl.cli.files import check_writable
from offsite_fl.cli.output import AsJson, Stages, emit, line, result
from offsite_fl.cli.parties import open_owner, read_repair, read_update
from offsite_fl.cli.plug import BundleOption, RepairOption
from offsite_fl.cli.scoring import check_test, score_of, tested
from offsite_fl.cli.settings import BatchSize, BlockSize, LossOn, Pairs, Seed, tune_settings
from offsite_fl.config import TuneConfig, to_mapping

if TYPE_CHECKING:
    from offsite_fl.evaluation.rows import FiveRows
    from offsite_fl.measure import Measure
    from offsite_fl.repair import Repair
    from offsite_fl.update import Update

NO_UPDATE = "No update was given: the rows of tuning are those of the adapter as it was handed out."


def evaluate(
    model: Model,
    bundle: BundleOption,
    data: Annotated[
        Path | None, typer.Option(metavar="TEST", help="Held-out data, of a kind that `tune` takes.")
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="TEST is multiple choice (prompt, choices, answer): rows in accuracy.")
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Rows in accuracy on tasks of lm-eval: a YAML file or a name, one or more."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many questions (of each task).")] = None,
    update: Annotated[Path | None, typer.Option(metavar="UPDATE", help="What came back from tuning.")] = None,
    repair: RepairOption = None,
    fine_tune: Annotated[
        list[Path] | None,
        typer.Option(metavar="TRAIN", help="Data for the fifth row, full fine-tuning; once for each data owner."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of full fine-tuning; those of the update if it tells them.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of full fine-tuning (1e-4).")] = None,
    batch_size: BatchSize = None,
    block_size: BlockSize = None,
    loss_on: LossOn = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use the first so many tokens of TEST only.")] = None,
    seed: Seed = None,
    pairs: Pairs = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write report.json, .csv and .html here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the five rows: full zero-shot, emulator zero-shot, emulator tuned, plug-in, full fine-tuning.

    MODEL is a folder, a hub id, or smollm2. Full fine-tuning takes time and is done if --fine-tune names its data.
    Give --data, or --tasks in its place.
    """
    stages = Stages()
    check_test(data, accuracy, tasks, limit)
    config = tune_settings(
        pairs, max_steps=steps, lr=lr, batch_size=batch_size, block_size=block_size, loss_on=loss_on, seed=seed
    )
    with stages(f"opening {model}"):
        from offsite_fl.bundle import OwnerMap, open_bundle
        from offsite_fl.evaluation.record import RunReport, versions
        from offsite_fl.evaluation.tables import print_report, summary
        from offsite_fl.measure import Measure

        if out is not None:
            check_writable(out / "report.json")
        opened = open_bundle(bundle)
        came, note = read_update(update, opened) if update else None, OwnerMap.load(opened.path)
        config, less = _with_steps(config, came), read_repair(repair, opened)
        owner = open_owner(model, opened, note)
        score = score_of(owner, data, accuracy, tasks, limit, config)
        measure = Measure(
            owner,
            data,
            block_size=config.block_size,
            batch_size=config.batch_size,
            max_tokens=max_tokens,
            loss_on=config.loss_on,
            progress=True,
            score=score,
        )
        # What is wrong with the data should be told now, not after four rows.
        leak = measure.leak(fine_tune) if fine_tune else None
    rows = five_rows(measure, came, fine_tune or [], config, stages, less)
    given: dict[str, Any] = {"model": model, "bundle": str(bundle), "update": update, "repair": repair, "data": data}
    given |= {"tasks": tasks or []}
    report = RunReport(
        rows=rows,
        config=_plain(given | {"fine-tune": fine_tune or []}) | to_mapping(config, "tune."),
        versions=versions(),
        seeds={"full fine-tuning": config.seed} if fine_tune else {},
        seconds=stages.seconds,
        emulator={"spec": note.emulator, **note.report, "bundle_bytes": opened.bytes_by_kind()},
        data=tested(measure, score, rows),
        notes=_notes(came, bool(fine_tune), config, less) + ([leak] if leak else []),
    )
    if out is not None:
        report.write(out)
    if as_json:
        emit(summary(report) | {"report": str(out) if out else None, "tokens": measure.tokens})
        return
    print_report(report, result())
    if out is not None:
        result().print(line(f"report: {out / 'report.html'}"), soft_wrap=True)


def five_rows(
    measure: Measure,
    update: Update | None,
    fine_tune: list[Path],
    config: TuneConfig,
    stages: Stages,
    repair: Repair | None = None,
) -> FiveRows:
    """Measure row by row; without an update nothing is tuned, and the two tuned rows equal the untuned ones."""
    from offsite_fl.evaluation.rows import FiveRows

    with stages("full zero-shot"):
        full = measure.full_zero_shot()
    with stages("emulator zero-shot"):
        emulator = measure.emulator_zero_shot()
    tuned, plugged, upper = emulator, full, None
    if update is not None:
        with stages("emulator tuned"):
            tuned = measure.emulator_tuned(update.tensors, update.lora)
        with stages("plug-in"):
            plugged = measure.plug_in(update.tensors, update.lora, repair)
    if fine_tune:
        with stages("full fine-tuning"):
            upper = measure.full_fine_tuning(fine_tune, config)
    return FiveRows(full, emulator, tuned, plugged, upper)


def _with_steps(config: TuneConfig, update: Update | None) -> TuneConfig:
    """As many steps of full fine-tuning as the update took, unless something else was asked for."""
    from dataclasses import replace

    took = int(update.metrics.get("steps", 0)) if update else 0
    return replace(config, max_steps=took) if config.max_steps is None and took else config


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [str(v) for v in value] if isinstance(value, list) else str(value or "") for key, value in given.items()
    }


def _notes(update: Update | None, fine_tuned: bool, config: TuneConfig, repair: Repair | None) -> list[str]:
    notes = [] if update else [NO_UPDATE]
    if repair is not None:
        notes.append(repair.note)
    if fine_tuned:
        length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epochs"
        notes.append(f"Full fine-tuning: {length} in batches of {config.batch_size}, learning rate {config.lr:g}.")
    return notes
