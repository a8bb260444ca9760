"""LoRA factors on the emulator's linears: added to what a linear computes, whatever the linear is made of.

Not through ``peft``, which knows dense linears only: here a low-rank or a packed linear of the closed table takes
factors as well, as a whole, and the network's modules, names and values stay as they are to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offsite_fl.config import LoraOptions
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, is_linear, is_named, linear_weight
from offsite_fl.models.network import NetworkPlan, place_blocks
from offsite_fl.registry import near
from offsite_fl.tuning.lora import A, B, drawn, factors_of, set_factors


class EmulatorLora:
    """Factors on the emulator blocks of ``network`` until :meth:`remove`.

    They begin as in :class:`~offsite_fl.tuning.lora.AdapterLora`: every B zero, so the network computes the same as
    before, and A drawn from ``seed``. A block that runs at two places has one pair of factors a linear. ``ConfigError``
    if a target of ``options`` names no linear of the emulator, ``EmulatorError`` if there is none at all.
    """

    def __init__(self, network: nn.Module, plan: NetworkPlan, options: LoraOptions, seed: int = 0) -> None:
        if options.dropout:
            raise ConfigError(
                f"LoRA on the emulator has no dropout, since both sides must agree; got {options.dropout}"
            )
        self.options = options
        found = _emulator_linears(network, plan)
        wanted = _wanted(found, options.targets)
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {
            name: nn.Parameter(
                drawn(*shape, generator) if name.endswith(A) else torch.zeros(shape), requires_grad=False
            )
            for name, shape in _factors(found, wanted, options.rank).items()
        }
        self._hooks = [
            module.register_forward_hook(_Adds(self.parameters[name + A], self.parameters[name + B], self.scale))
            for name in wanted
            for module in found[name]
        ]

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.options.alpha / self.options.rank

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the factors, fp32 on the CPU."""
        return factors_of(self.parameters)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all factors; ``UpdateError`` names one that is missing, unknown or wrong, and nothing is changed."""
        set_factors(self.parameters, tensors)

    def to(self, device: torch.device) -> None:
        """Move the factors; the parameters stay the same objects."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)

    def remove(self) -> None:
        """Give the network back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Adds:
    """Forward hook of a linear: ``y + scale * B A x``, the product in fp32."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.a.device != output.device:  # the network was moved since
            self.a.data, self.b.data = self.a.data.to(output.device), self.b.data.to(output.device)
        small = F.linear(args[0].to(self.a.dtype), self.a)
        return output + (self.scale * F.linear(small, self.b)).to(output.dtype)


def emulator_factors(network: nn.Module, plan: NetworkPlan, options: LoraOptions) -> dict[str, tuple[int, int]]:
    """Names and shapes of the factors that :class:`EmulatorLora` makes, worked out without making them."""
    found = _emulator_linears(network, plan)
    return _factors(found, _wanted(found, options.targets), options.rank)


def _factors(found: Mapping[str, list[nn.Module]], wanted: list[str], rank: int) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for name in wanted:
        rows, columns = _shape(found[name][0])
        shapes |= {name + A: (rank, columns), name + B: (rows, rank)}
    return shapes


def _emulator_linears(network: nn.Module, plan: NetworkPlan) -> dict[str, list[nn.Module]]:
    """Slot name to the modules of every linear in the emulator's blocks, one for each place that the block runs at.

    A replaced linear counts as a whole: the factors of a low-rank one aren't linears of their own.
    """
    found: dict[str, list[nn.Module]] = {}
    for block, place in zip(place_blocks(network, plan), plan.layout, strict=True):
        if place.role != "emulator":
            continue
        inside: tuple[str, ...] = ()
        for path, module in block.named_modules():
            if path.startswith(inside):
                continue
            if isinstance(module, (LowRankLinear, QuantizedLinear)) or is_linear(module):
                inside = (*inside, path + ".")
                found.setdefault(place.prefix + path, []).append(module)
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, (LowRankLinear, QuantizedLinear)):
        return module.out_features, module.in_features
    rows, columns = linear_weight(module).shape
    return rows, columns


def _wanted(found: Mapping[str, object], targets: tuple[str, ...]) -> list[str]:
    """The names that match ``targets`` as in peft, by the whole path in the block or its end; all without targets."""
    if not found:
        raise EmulatorError("the emulator holds no linear that could be aligned")
    if not targets:
        return list(found)
    paths = {name: name.split(".", 2)[2] for name in found}
    for target in targets:
        if not any(is_named(path, target) for path in paths.values()):
            ends = dict.fromkeys(path.rpartition(".")[2] for path in paths.values())
            raise ConfigError(f"lora target {target!r} isn't in the emulator; {near(target, ends)}")
    return [name for name, path in paths.items() if any(is_named(path, target) for target in targets)]
