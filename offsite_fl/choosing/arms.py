"""Tuning on an emulator in memory: the adapter is a copy, each learning rate an arm, the owner's model untouched."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from offsite_fl.choosing.results import RateTried
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import tune_adapter
from offsite_fl.emulators import Context, Emulator
from offsite_fl.emulators.report import private_network
from offsite_fl.errors import OffsiteError
from offsite_fl.models.blocks import block_list
from offsite_fl.models.network import adapter_parameters
from offsite_fl.models.plug import adapter_tensors
from offsite_fl.tuning.lora import merge_lora
from offsite_fl.tuning.tune import TuneResult, planned_steps

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """The best of several arms: what it gave, its rate, what every rate gave, and how long all took."""

    values: Values
    rate: float
    rates: tuple[RateTried, ...]
    seconds: float


def best_rate(rates: Sequence[float], arm: Callable[[float], tuple[Values, TuneResult]]) -> Outcome:
    """Run ``arm`` at each rate and keep the one with the lowest validation loss.

    A rate that diverges is out. Where all do, the first one's error is raised.
    """
    began = time.perf_counter()
    tried: list[RateTried] = []
    best: tuple[float, float, Values] | None = None
    failed: OffsiteError | None = None
    for rate in rates:
        try:
            values, done = arm(rate)
        except OffsiteError as error:
            failed = failed or error
            tried.append(RateTried(rate, None))
            continue
        assert done.validation_loss is not None  # every arm gets validation examples
        tried.append(RateTried(rate, done.validation_loss))
        if best is None or done.validation_loss < best[0]:
            best = (done.validation_loss, rate, values)
    if best is None:
        raise failed or OffsiteError("no learning rate was given")
    return Outcome(best[2], best[1], tuple(tried), time.perf_counter() - began)


def tuned_adapter(
    emulator: Emulator,
    context: Context,
    train: Dataset,
    config: TuneConfig,
    pad_id: int,
    validation: Dataset | None = None,
) -> tuple[dict[str, Tensor], TuneResult]:
    """Tune the adapter, or LoRA factors inside it, on adapter + emulator, as a data owner does.

    Returns the adapter's full values with the factors merged, fp32 on the CPU by slot name, and what tuning tells.
    """
    network, plan = private_network(emulator, context)
    done = tune_adapter(network, plan, train, config, validation=validation, pad_id=pad_id)
    if config.lora is None:
        return dict(done.tensors), done
    stack = block_list(context.model, context.blocks)
    # Into the owner's own values: those in the network may have been cast for tuning.
    originals = {slot: stack[index] for slot, index in enumerate(context.adapter)}
    return merge_lora(originals, done.tensors, config.lora), done


@torch.no_grad()
def emulator_with(values: Values, emulator: Emulator, context: Context) -> nn.Module:
    """Adapter + emulator in the model's own dtypes, with the given adapter values."""
    network, plan = private_network(emulator, context)
    for name, parameter in adapter_parameters(network, plan).items():
        parameter.copy_(values[name])
    return network


def scaled(values: Values, context: Context, scale: float) -> dict[str, Tensor]:
    """``base + scale * (values - base)``, where ``base`` is the full model's adapter."""
    starts = untuned(context)
    return {name: starts[name] + scale * (value.float() - starts[name]) for name, value in values.items()}


def untuned(context: Context) -> dict[str, Tensor]:
    """The full model's adapter and head by slot name, fp32 on the CPU."""
    base = adapter_tensors(context.model, context.blocks, context.adapter, context.head)
    return {name: parameter.detach().float().cpu() for name, parameter in base.items()}


def on_public(config: TuneConfig, train: Dataset) -> TuneConfig:
    """``config`` for the model owner who plays a data owner with ``train`` on public examples: as many steps."""
    return replace(config, max_steps=planned_steps(len(train), config), validation_share=0.0, patience=None)


def at_rate(config: TuneConfig, rate: float, seed: int) -> TuneConfig:
    """``config`` with the learning rate and the seed of one arm."""
    return replace(config, lr=rate, seed=seed)
