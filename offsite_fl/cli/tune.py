"""``offsite-fl tune``: the data owner tunes the adapter on private data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offsite_fl.cli.files import check_update_file
from offsite_fl.cli.inspect import Digest, Folder
from offsite_fl.cli.output import AsJson, Stages, emit, line, result
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


def tune(
    bundle: Folder,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Your data: .jsonl, .json, .csv, .parquet or .txt, or a folder of images. It stays here.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="UPDATE", help="The update to write (.safetensors); an older one is replaced."),
    ],
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Data to watch; the values that do best on it are kept.")
    ] = None,
    validation_share: Annotated[float | None, typer.Option(help="Or set aside this share of the data.")] = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    block_size: BlockSize = None,
    loss_on: LossOn = None,
    lora_rank: LoraRank = None,
    precision: Annotated[str | None, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; chosen by itself if not given.")] = None,
    seed: Seed = None,
    pairs: Pairs = None,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Tune a bundle's adapter on your data and write the update, the only thing that goes back to the model owner.

    BUNDLE is the bundle's folder.
    """
    config = tune_settings(
        pairs,
        validation_share=validation_share,
        epochs=epochs,
        max_steps=max_steps,
        lr=lr,
        batch_size=batch_size,
        block_size=block_size,
        loss_on=loss_on,
        lora_rank=lora_rank,
        precision=precision,
        device=device,
        seed=seed,
    )
    stages = Stages()
    with stages(f"opening bundle {bundle}"):
        from offsite_fl.bundle import open_bundle
        from offsite_fl.data_owner import DataOwner

        check_update_file(out)
        data_owner = DataOwner.open(open_bundle(bundle, digest=digest), config.frozen_dtype, config.device)
    with stages(f"tuning on {data}"):
        update = data_owner.tune(data, config, validation=validation)
    update.save(out)
    found = {
        "update": str(out),
        "bytes": out.stat().st_size,
        "tensors": len(update.tensors),
        "digest": update.digest,
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
        "seconds": stages.seconds,
    }
    if as_json:
        emit(found)
        return
    from offsite_fl.sizes import human_bytes

    steps, losses = round(update.metrics["steps"]), [f"training loss {update.metrics['train-loss']:.4f}"]
    if "validation-loss" in update.metrics:
        losses.append(f"validation loss {update.metrics['validation-loss']:.4f}")
    unit = "nats/token" if data_owner.classes is None else "nats/example"
    said = f"{update.num_examples} examples, {steps} steps, {', '.join(losses)} {unit}"
    result().print(
        line(f"update {out}: {len(update.tensors)} tensors, {human_bytes(out.stat().st_size)}"), soft_wrap=True
    )
    result().print(line(said), soft_wrap=True)
