"""The model owner: makes the bundle, runs the federation around it, and reports the five rows."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from offsite_fl.evaluation.record import RunReport, versions
from offsite_fl.evaluation.rows import FiveRows, Row
from offsite_fl.evaluation.tables import print_report
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.repair import Repair
from offsite_fl.strategies import FedPer, OffsiteTuning, central_evaluation
from offsite_fl.strategies.checkpoint import check_unused
from offsite_fl.strategies.named import make_strategy
from quickstart.attack import threat_of
from quickstart.settings import Settings

app = ServerApp()
console = Console()


class Clock:
    """Seconds by stage, said aloud as each begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside the ``with`` block."""
        console.print(f"[bold]{stage}[/] ...")
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)
        console.print(f"[bold]{stage}[/] took {self.seconds[stage]:.1f} s")


def seed_everything(seed: int) -> None:
    """What this process draws at random: Flower samples nodes with ``random``, its privacy wrappers use numpy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the federation, from the full model to the report."""
    settings, clock = Settings.of(context.run_config), Clock()
    threat_of(context.run_config)  # an attack that can't be carried out ends the run here, not its rounds
    folder = Path(settings.run.folder).absolute()
    seed_everything(settings.main.seed)
    with clock("opening the model"):
        owner = ModelOwner.from_pretrained(settings.main.model_path(), Split.parse(settings.main.split))
    with clock("making the bundle"):
        bundle_of(owner, settings, folder)
    measure = Measure(
        owner, settings.data.file("test"), block_size=settings.tune.block_size, max_tokens=settings.test.tokens
    )
    strategy = OffsiteTuning(
        make_strategy(settings.main.strategy),
        owner,
        codec=settings.main.codec,
        tune=settings.tune,
        min_results=settings.main.min_results,
        max_update_norm=settings.main.max_update_norm or None,
        clip_update_norm=settings.main.clip_update_norm or None,
        max_norm_ratio=settings.main.max_norm_ratio or None,
        min_cosine=settings.main.min_cosine,
        streaming=settings.main.streaming,
        round_deadline=settings.main.round_deadline or None,
        quorum=settings.main.quorum or None,
        public=settings.data.file("public", ".txt"),
        run_dir=folder,
        resume=settings.run.resume,
        keep_checkpoints=settings.run.keep_checkpoints,
        delivery_timeout=settings.main.delivery_timeout,
    )
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


def five_rows(
    strategy: OffsiteTuning, measure: Measure, full_fine_tuning: Row | None, repair: Repair | None = None
) -> FiveRows:
    """The rows, from what was measured in round 0 and after the last round where that was done."""
    before, after, update = strategy.history[0], strategy.history[-1], strategy.update()
    plugged = after.plug_in if repair is None else None
    return FiveRows(
        # In round 0 nothing is tuned yet: the plug-in is the full model, and the emulator as it was handed out.
        before.plug_in or measure.full_zero_shot(),
        before.emulator or measure.emulator_zero_shot(),
        after.emulator or measure.emulator_tuned(update.tensors, update.lora),
        plugged or measure.plug_in(update.tensors, update.lora, repair),
        full_fine_tuning,
    )


def bundle_of(owner: ModelOwner, settings: Settings, folder: Path) -> None:
    """Make the bundle, or take up the one that a run to be resumed has made."""
    if settings.run.resume and (folder / "bundle").is_dir():
        owner.use_bundle(folder / "bundle")
        return
    check_unused(folder)  # before the bundle of the run that is there is replaced
    owner.make_bundle(
        settings.main.emulator,
        folder / "bundle",
        calibration=settings.data.file("public", ".txt"),
        calibration_tokens=settings.main.calibration_tokens,
        block_size=settings.tune.block_size,
        dtype=getattr(torch, settings.main.bundle_dtype) if settings.main.bundle_dtype else None,
        shard_bytes=settings.main.bundle_shard_size,
        seed=settings.main.seed,
        workdir=folder / "work",
        progress=True,
    )


@dataclass(frozen=True)
class Work:
    """What the federation did: who took part, optimiser steps one after the other, and examples in each of them."""

    owners: tuple[str, ...]
    steps: int
    examples: int

    @classmethod
    def of(cls, strategy: OffsiteTuning, settings: Settings) -> Work:
        """From what the data owners reported. They tune side by side, so a round has the steps of its busiest one."""
        rounds = [entry.clients for entry in strategy.history if entry.clients]
        steps = sum(int(max(metrics.get("steps", 0) for metrics in clients.values())) for clients in rounds)
        tokens = sum(metrics.get("tokens", 0) for clients in rounds for metrics in clients.values())
        seen = {name for clients in rounds for name in clients}
        known = tuple(owner for owner in settings.data.owners if owner in seen)
        return cls(
            known or settings.data.owners,
            max(1, steps),
            max(1, round(tokens / max(1, steps) / settings.tune.block_size)),
        )


def upper_bound(measure: Measure, strategy: OffsiteTuning, settings: Settings) -> Row:
    """Full fine-tuning on pooled data with the federation's optimiser steps and tokens.

    A round of n owners with s steps of b examples each has s sequential steps over n * b examples; so does this.
    """
    work = Work.of(strategy, settings)
    config = replace(
        settings.tune,
        max_steps=work.steps,
        lr=settings.baseline.lr,
        gradient_accumulation=max(1, round(work.examples / settings.tune.batch_size)),
        schedule_steps=work.steps,
        schedule_offset=0,
        proximal_mu=0.0,
        validation_share=0.0,
        patience=None,
        progress=True,
    )
    return measure.full_fine_tuning([settings.data.file(owner) for owner in work.owners], config)


def measured_repair(owner: ModelOwner, strategy: OffsiteTuning, settings: Settings) -> Repair:
    """What as many steps as the busiest data owner took repair in the emulator, on the public text."""
    steps = Work.of(strategy, settings).steps
    config = replace(settings.tune, max_steps=steps, schedule_steps=steps, schedule_offset=0, progress=True)
    public = settings.data.file("public", ".txt")
    return owner.measure_repair(public, config, share=settings.repair.share, scale=settings.repair.scale)


def without_repair(strategy: OffsiteTuning) -> str:
    """The last round's plug-in as it came, for whoever wants to compare."""
    row = strategy.history[-1].plug_in
    said = f"{row.perplexity:.1f}" if row is not None else "not measured"
    return f"The curves show the plug-in with the repair still in it; after the last round its perplexity was {said}."


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
            "held-out test": {"tokens": measure.tokens},
            "calibration (public)": {"tokens": settings.main.calibration_tokens},
            **{owner: {"tokens tuned on": tokens} for owner, tokens in tokens_by_client(strategy).items()},
        },
        notes=notes(strategy, settings),
    )


def notes(strategy: OffsiteTuning, settings: Settings) -> list[str]:
    """What a reader of the numbers must know."""
    found = ["Perplexities are on held-out works of the data owners' kinds, never tuned on. One seed."]
    work = Work.of(strategy, settings)
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


def tokens_by_client(strategy: OffsiteTuning) -> dict[str, int]:
    """How many tokens each data owner's tuning went through in all rounds."""
    sums: dict[str, float] = {}
    for entry in strategy.history:
        for name, metrics in entry.clients.items():
            sums[name] = sums.get(name, 0) + metrics.get("tokens", 0)
    return {name: int(total) for name, total in sums.items()}
