"""What a tuning call borrows and gives back: accelerate's process-wide state, the network's modes, the random state."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]
from accelerate.state import AcceleratorState, GradientState, PartialState  # type: ignore[import-untyped,unused-ignore]
from accelerate.utils import GradientAccumulationPlugin  # type: ignore[import-untyped,unused-ignore]
from torch import nn

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError
from offsite_fl.tuning.dtypes import resolve_device

# accelerate's state and torch's random numbers belong to the process, so threads tune one after another.
_ONE_AT_A_TIME = threading.RLock()
_STATES = (AcceleratorState, PartialState, GradientState)


@contextmanager
def borrowed_accelerator(config: TuneConfig) -> Iterator[Accelerator]:
    """An Accelerator with the device and precision of ``config``, whatever this process made before.

    All Accelerators of a process share one state, and a second one with another precision raises. So the state is
    put aside and restored; an Accelerator that the caller holds keeps working afterwards.
    """
    device = resolve_device(config)
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision = 'fp16' needs a GPU; on a CPU use 'no' or 'bf16'")
    with _ONE_AT_A_TIME:
        saved = [dict(state._shared_state) for state in _STATES]
        for state in _STATES:
            state._shared_state.clear()
        try:
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=config.precision,
                # Accumulation is counted in tokens by the loop; an environment variable must not divide once more.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
            accelerator.state.device = device
            yield accelerator
        except ValueError as error:
            if "mixed precision" not in str(error):
                raise
            raise ConfigError(f"precision = {config.precision!r} can't be used on {device}: {error}") from error
        finally:
            for state, content in zip(_STATES, saved, strict=True):
                state._shared_state.clear()
                state._shared_state.update(content)


@contextmanager
def training_mode(network: nn.Module, trainable: Mapping[str, nn.Parameter], config: TuneConfig) -> Iterator[None]:
    """Only ``trainable`` requires gradients, the network is in training mode; all of it is undone at the end."""
    inside = {id(parameter) for parameter in network.parameters()}
    foreign = [name for name, parameter in trainable.items() if id(parameter) not in inside]
    if foreign or not trainable:
        what = f"{foreign[0]!r} isn't a parameter of the network" if foreign else "no tensor is to be trained"
        raise ConfigError(f"{what}; pass live parameters of this network")
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    checkpointing = config.gradient_checkpointing and not _is_checkpointing(network)
    try:
        network.requires_grad_(False)
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        network.train()
        if checkpointing:
            _checkpointing(network, True)
        yield
    finally:
        if checkpointing:
            _checkpointing(network, False)
        for parameter, flag in required:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _is_checkpointing(network: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def _checkpointing(network: nn.Module, on: bool) -> None:
    # transformers renames these methods on the way to version 6
    kind = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
    if not getattr(network, "supports_gradient_checkpointing", False):
        if on:
            raise ConfigError(f"{type(network).__name__} doesn't support gradient-checkpointing; switch it off")
    elif on:
        # The re-entrant kind would need inputs with gradients and breaks where the first blocks are frozen.
        options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(network, f"{kind}_checkpointing_enable")(**options)
    else:
        getattr(network, f"{kind}_checkpointing_disable")()


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout drawn from ``seed``; the process's random state is as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
