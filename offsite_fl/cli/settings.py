"""From options to the library's own settings, so that what is wrong is told in the library's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from offsite_fl.config import Scalar, TuneConfig, from_mapping, kebab
from offsite_fl.errors import ConfigError
from offsite_fl.registry import near

if TYPE_CHECKING:
    import torch

    from offsite_fl.models.split import Split

DTYPES = ("float32", "bfloat16", "float16")
KEYS = ", ".join(sorted(kebab(field.name) for field in dataclasses.fields(TuneConfig)))

Epochs = Annotated[float | None, typer.Option(help="Passes over the data (1).")]
MaxSteps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate (1e-4).")]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a batch.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in an example.")]
LossOn = Annotated[str | None, typer.Option(help="Tokens that count: all, or answer (prompt/answer data).")]
LoraRank = Annotated[int | None, typer.Option(help="Above 0: tune LoRA factors inside the adapter only.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything random.")]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help=f"Any setting of tuning, as often as needed. Keys: {KEYS}."),
]


def tune_settings(pairs: Sequence[str] | None, **options: Scalar | None) -> TuneConfig:
    """Settings of tuning from ``--set`` pairs and the options that were given (not None), by field name.

    >>> tune_settings(["warmup-steps=2"], lr=0.5, epochs=None).warmup_steps
    2
    """
    values: dict[str, Scalar] = {kebab(name): value for name, value in options.items() if value is not None}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        key = kebab(key.strip())
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} isn't KEY=VALUE", param_hint="--set")
        if key in values:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--set")
        values[key] = text.strip()
    return from_mapping(TuneConfig, values)


def split_of(first: int | None, last: int | None, at: str | None) -> Split:
    """The split that ``--first`` and ``--last``, or ``--at``, ask for; 2 and 2 if none is given."""
    from offsite_fl.models.split import Split

    if at is not None:
        if first is not None or last is not None:
            raise typer.BadParameter("--at names every block; give it without --first and --last", param_hint="--at")
        return Split.parse(f"at={at}")
    default = Split()
    return Split(default.first if first is None else first, default.last if last is None else last)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of an option; None stays None."""
    if name is None:
        return None
    import torch

    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} isn't possible; {near(name, DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def head_of(text: str) -> str | tuple[str, ...]:
    """What ``--head`` says: "auto", "none", or the paths between its commas."""
    return text if text in ("auto", "none") else tuple(part.strip() for part in text.split(",") if part.strip())
