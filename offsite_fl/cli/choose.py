"""``offsite-fl choose``: which emulator to hand out, found by measuring candidates side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite_fl.cli.bundle import Model
from offsite_fl.cli.files import check_writable
from offsite_fl.cli.output import AsJson, Stages, emit, line, result
from offsite_fl.cli.settings import BatchSize, BlockSize, LossOn, Pairs, head_of, tune_settings
from offsite_fl.cli.spread import SpreadSplit, cut_of, provisional_split, split_owner
from offsite_fl.config import TuneConfig, check, kebab
from offsite_fl.errors import ConfigError

if TYPE_CHECKING:
    from offsite_fl.choosing import Choice

FILES = ("choose.html", "choose.json", "choose.csv", "choose.md")
# Enough steps to tell emulators apart, few enough to try many; --set and the options say otherwise.
TUNING = {"max_steps": 16, "batch_size": 8, "lr": 5e-4, "schedule": "cosine"}


def choose(
    model: Model,
    calibration: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Public text, for a classifier labelled examples; never a data owner's."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Of this comparison; what is there isn't measured again.")
    ],
    budget: Annotated[str, typer.Option(metavar="SIZE", help="Of the emulator: 40% of the middle, or 40MB.")] = "50%",
    candidate: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Once for each; {keep} in it stands for the budget. Default: every method."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Data like the data owners', to tune on; once for each file or folder."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out data of that kind; else a tenth of --data.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N", help="How many (3), or which (0,7,8).")] = "1",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of tuning (16).")] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate (5e-4); of several the best by the emulator's validation loss counts."),
    ] = None,
    full_fine_tuning: Annotated[bool, typer.Option("--full-fine-tuning", help="Run that too, as upper bound.")] = False,
    full_lr: Annotated[list[float] | None, typer.Option(help="Its learning rates (5e-5 and 1e-4).")] = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="Factors of the update to try in the plug-in, chosen on public text.")
    ] = None,
    batch_size: BatchSize = None,
    block_size: BlockSize = None,
    loss_on: LossOn = None,
    pairs: Pairs = None,
    first: Annotated[int | None, typer.Option(help="How many of the first blocks are adapter (2).")] = None,
    last: Annotated[int | None, typer.Option(help="How many of the last blocks are adapter (2).")] = None,
    at: Annotated[str | None, typer.Option(metavar="0,5,...", help="Or exactly these blocks, from 0.")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Or 2-2, at=0,5,... or spread=KEEP/ADAPTER, as in `bundle`.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Public text that methods work on (8192).")
    ] = None,
    held_out_tokens: Annotated[int | None, typer.Option(min=1, help="Public text behind it (2048).")] = None,
    test_tokens: Annotated[int | None, typer.Option(min=1, help="Test data to measure on (4096).")] = None,
    calibration_examples: Annotated[
        int | None, typer.Option(min=1, help="For a classifier: public examples that methods work on (256).")
    ] = None,
    held_out_examples: Annotated[int | None, typer.Option(min=1, help="And those to measure on (64).")] = None,
    test_examples: Annotated[int | None, typer.Option(min=1, help="And test data to measure on (400).")] = None,
    head: Annotated[
        str, typer.Option(metavar="auto|none|PATH,...", help="What is tuned outside the blocks, as in `bundle`.")
    ] = "auto",
    head_from: Annotated[
        str | None,
        typer.Option(
            metavar="calibration|model",
            help="What a classifier begins with: the nearest-class-mean head of the calibration examples, or its own.",
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Measure the plug-in with the repair taken out, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build emulators of one size, measure them side by side, and say which one to hand out.

    MODEL is a folder, a hub id, or smollm2.

    With --data each candidate is tuned on, and the one with the best plug-in among those that protect the model is
    named; without, the one that keeps the adapter's gradients best. A classifier of images or text is judged by
    accuracy. FOLDER gets choose.html, .json, .csv and .md.
    """
    if not data:
        _refuse_tuning(steps=steps, lr=lr, scale=scale, test_tokens=test_tokens, test_examples=test_examples)
    check(not full_lr or full_fine_tuning, "--full-lr is for --full-fine-tuning, which isn't asked for")
    config, chosen = _tuning(pairs, steps, batch_size, block_size, loss_on), _seeds(seeds)
    cut, stages = cut_of(first, last, at, split), Stages()
    with stages("getting ready"):
        from offsite_fl.choosing import Budget
        from offsite_fl.choosing import choose as compare
        from offsite_fl.choosing.candidates import check_candidates
        from offsite_fl.emulators import parse_emulator
        from offsite_fl.evaluation.plots import require_matplotlib
        from offsite_fl.owner import ModelOwner

        # Before the long work, which would be lost.
        size = Budget.parse(budget)
        check_candidates(candidate or (), size)
        if isinstance(cut, SpreadSplit):
            cut.check(calibration)
        _check_free(out)
        require_matplotlib()
    with stages(f"opening {model}"):
        start = provisional_split() if isinstance(cut, SpreadSplit) else cut
        owner = ModelOwner.from_pretrained(model, start, head=head_of(head), device=config.device)
    if isinstance(cut, SpreadSplit):
        with stages(f"placing the adapter: {cut}"):
            crash = parse_emulator("crash")
            tokens = calibration_tokens or (calibration_examples or 0) * config.block_size or 8192
            owner = split_owner(owner, cut, crash, calibration, tokens, config.block_size, 0)
    with stages("comparing emulators"):
        choice = compare(
            owner,
            calibration=calibration,
            out=out,
            budget=size,
            candidates=candidate,
            data=data or None,
            test=test,
            tune=config,
            rates=lr or (),
            full_rates=full_lr or (5e-5, 1e-4),
            full_fine_tuning=full_fine_tuning,
            seeds=chosen,
            scales=scale or (1.0,),
            calibration_tokens=calibration_tokens,
            held_out_tokens=held_out_tokens,
            test_tokens=test_tokens,
            calibration_examples=calibration_examples,
            held_out_examples=held_out_examples,
            test_examples=test_examples,
            head_from=head_from,
            repair=repair,
            progress=True,
            name=Path(model).name,
        )
    choice.write()
    if as_json:
        emit(choice.to_dict() | {"out": str(out), "seconds": stages.seconds})
    else:
        _print(choice, model)


def _refuse_tuning(**options: Any) -> None:
    """``ConfigError`` for options about tuning where there is nothing to tune on."""
    for name, value in options.items():
        check(not value, f"--{kebab(name)} is about tuning, and without --data nothing is tuned: give both or neither")


def _check_free(out: Path) -> None:
    """``ConfigError`` unless the page and the tables can be written to ``out`` and replace nothing but their like."""
    check_writable(out / "choose.json")
    there = [name for name in FILES if (out / name).exists()]
    if there and not (out / "cells.jsonl").is_file():
        raise ConfigError(
            f"{out} has {' and '.join(there)} but no cells.jsonl, so no comparison was made there, and they won't be "
            "overwritten; give another --out"
        )


def _print(choice: Choice, model: str) -> None:
    from offsite_fl.choosing.table import rich_table

    console = result()
    console.print(rich_table(choice, console.width))
    for standing in choice.standings:
        for error in standing.errors:
            console.print(line(f"failed: {standing.spec}: {error}"), style="yellow", soft_wrap=True)
    if choice.best is not None:
        console.print(line(f"take: {choice.best.spec}"), style="bold", soft_wrap=True)
    console.print(line(choice.why), soft_wrap=True)
    for name in FILES:
        console.print(line(f"{name.partition('.')[2]}: {choice.out / name}"), soft_wrap=True)


def _tuning(pairs: list[str] | None, steps: int | None, *sizes: Any) -> TuneConfig:
    """How candidates are tuned: :data:`TUNING` where neither an option nor ``--set`` says otherwise."""
    batch_size, block_size, loss_on = sizes
    given = {"max_steps": steps, "batch_size": batch_size, "block_size": block_size, "loss_on": loss_on}
    named = {kebab(pair.partition("=")[0].strip()) for pair in pairs or ()}
    for name, value in TUNING.items():
        if given.get(name) is None and kebab(name) not in named:
            given[name] = value
    return tune_settings(pairs, **given)


def _seeds(text: str) -> tuple[int, ...]:
    """``3`` is three seeds from 0 on, ``0,7,8`` are these."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or (numbers == (0,) and "," not in text):
        raise typer.BadParameter(f"{text!r} is neither a number of seeds (3) nor a list (0,7,8)", param_hint="--seeds")
    return numbers if "," in text else tuple(range(numbers[0]))
