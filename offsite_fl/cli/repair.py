"""``offsite-fl repair``: the model owner measures what tuning does only to put the emulator right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offsite_fl.cli.bundle import Model
from offsite_fl.cli.files import check_update_file
from offsite_fl.cli.output import AsJson, Stages, emit, line, result
from offsite_fl.cli.parties import open_owner
from offsite_fl.cli.plug import BundleOption
from offsite_fl.cli.settings import (
    BatchSize,
    BlockSize,
    Epochs,
    LearningRate,
    LoraRank,
    LossOn,
    MaxSteps,
    Pairs,
    Seed,
    tune_settings,
)


def repair(
    model: Model,
    bundle: BundleOption,
    public: Annotated[
        Path, typer.Option(metavar="FILE", help="Public text of a kind that `tune` takes; never a data owner's.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="REPAIR", help="The file to write (.safetensors); an older one is replaced.")
    ],
    share: Annotated[float, typer.Option(min=0, help="How much of the repair is taken out of a change.")] = 1.0,
    scale: Annotated[float, typer.Option(min=0, help="How much of what is left is plugged in.")] = 1.0,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    block_size: BlockSize = None,
    loss_on: LossOn = None,
    lora_rank: LoraRank = None,
    seed: Seed = None,
    pairs: Pairs = None,
    as_json: AsJson = False,
) -> None:
    """Measure the repair: what an adapter learns only to make up for the emulator, of no use in the full model.

    MODEL is a folder, a hub id, or smollm2. Plays a data owner on public text, once on the emulator and once on the
    full model, with the settings that the data owners tune with and all their steps; `plug --repair` takes the
    difference out of an update.
    """
    config = tune_settings(
        pairs,
        epochs=epochs,
        max_steps=max_steps,
        lr=lr,
        batch_size=batch_size,
        block_size=block_size,
        loss_on=loss_on,
        lora_rank=lora_rank,
        seed=seed,
    )
    stages = Stages()
    with stages(f"opening {model}"):
        from offsite_fl.bundle import OwnerMap, open_bundle

        check_update_file(out)
        opened = open_bundle(bundle)
        owner = open_owner(model, opened, OwnerMap.load(opened.path))
    with stages(f"tuning on {public}, on the emulator and on the full model"):
        found = owner.measure_repair(public, config, share=share, scale=scale)
    found.save(out)
    told = {
        "repair": str(out),
        "digest": found.digest,
        "steps": found.steps,
        "share": found.share,
        "scale": found.scale,
        "norm": found.norm,
        "seconds": stages.seconds,
    }
    if as_json:
        emit(told)
        return
    said = f"repair {out}: norm {found.norm:.4g} after {found.steps} steps"
    result().print(line(f"{said}; `plug --repair {out}` takes it out of an update"), soft_wrap=True)
