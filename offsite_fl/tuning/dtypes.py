"""Trained tensors in fp32 and frozen ones in a smaller dtype, inside one network."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HOOKS: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()


def resolve_device(config: TuneConfig) -> torch.device:
    """The device to tune on: the one asked for, else CUDA, MPS or the CPU, whichever is found first."""
    if config.device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and found.type in ("cuda", "mps") else torch.device("cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device = {config.device!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def frozen_dtype(config: TuneConfig, device: torch.device) -> torch.dtype:
    """Dtype of what isn't trained. ``auto`` is bf16 on a CUDA device that computes in it, and fp32 elsewhere."""
    if config.frozen_dtype != "auto":
        return _DTYPES[config.frozen_dtype]
    small = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if small else torch.float32


def prepare_dtypes(network: nn.Module, trainable: Mapping[str, nn.Parameter], config: TuneConfig) -> torch.dtype:
    """Make trained parameters fp32 and all others the frozen dtype; parameters stay the same objects.

    Where the two differ, every part of one dtype gets its inputs in that dtype, so that the network runs with and
    without autocast. Buffers (rotary tables, packed weights and their scales) are left alone.

    Returns
    -------
    The frozen dtype.
    """
    small = frozen_dtype(config, resolve_device(config))
    trained = {id(parameter) for parameter in trainable.values()}
    for parameter in network.parameters():
        wanted = torch.float32 if id(parameter) in trained else small
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
    for handle in _HOOKS.pop(network, []):
        handle.remove()
    if len(_dtypes(network)) > 1:
        _HOOKS[network] = [
            module.register_forward_pre_hook(cast_inputs, with_kwargs=True) for module in _uniform_parts(network)
        ]
    return small


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters() if p.is_floating_point()}


def _uniform_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules whose parameters are all of one dtype: whole blocks mostly, single linears under LoRA."""
    for child in module.children():
        never_called = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if len(_dtypes(child)) == 1 and not never_called:
            yield child
        else:
            yield from _uniform_parts(child)


def cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: floating inputs in the dtype of the module's weights; autocast does that by itself."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def cast(value: Any) -> Any:
        if type(value) is tuple:  # cosines and sines of rotary positions come as a pair
            return tuple(cast(v) for v in value)
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype
        if not floating or torch.is_autocast_enabled(value.device.type):
            return value
        return value.to(dtype)

    return cast(args), {name: cast(v) for name, v in kwargs.items()}


# Tells offsite_fl.evaluation.loss that a head with this hook computes what the bare head does.
cast_inputs.casts_only = True  # type: ignore[attr-defined]
