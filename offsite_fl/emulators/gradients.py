"""How well an emulator keeps the adapter's gradient: cosine and norm ratio against the full model, block by block.

The adapter learns from gradients that come through the emulator. Where they point elsewhere than on the full model, its
steps repair the emulator instead of learning the task, and the plug-in gains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.backward import frozen
from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.report import planned_network
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import evaluating
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.models.head import is_head
from offsite_fl.models.network import NetworkPlan, adapter_parameters
from offsite_fl.models.plug import adapter_tensors


@dataclass(frozen=True)
class GradientMatch:
    """Adapter gradients on an emulator against those on the full model.

    ``cosine`` and ``norm_ratio`` (emulator / full) are over all adapter tensors together, ``*_by_block`` for each
    adapter block in forward order.
    """

    cosine: float
    norm_ratio: float
    cosine_by_block: tuple[float, ...]
    norm_ratio_by_block: tuple[float, ...]


def full_gradients(context: Context, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Gradient of the mean next-token loss of the full model for each adapter tensor, by slot name, fp32."""
    live = adapter_tensors(context.model, context.blocks, context.adapter)
    return _gradients(context.model, live, batches)


def emulator_gradients(emulator: Emulator, context: Context, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The same through adapter + emulator."""
    return network_gradients(*planned_network(emulator, context), batches)


def network_gradients(network: nn.Module, plan: NetworkPlan, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The same through a network that stands already, the one of ``plan``."""
    blocks_only = {name: p for name, p in adapter_parameters(network, plan).items() if not is_head(name)}
    return _gradients(network, blocks_only, batches)


def match_gradients(ours: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> GradientMatch:
    """Compare two sets of adapter gradients by slot name (``adapter.{slot}.{path}``).

    >>> full = {"adapter.0.w": torch.tensor([1.0, 0.0]), "adapter.1.w": torch.tensor([0.0, 2.0])}
    >>> ours = {"adapter.0.w": torch.tensor([0.0, 1.0]), "adapter.1.w": torch.tensor([0.0, 4.0])}
    >>> match = match_gradients(ours, full)
    >>> match.cosine_by_block, match.norm_ratio_by_block, round(match.cosine, 3)
    ((0.0, 1.0), (1.0, 2.0), 0.868)
    """
    slots: dict[int, list[str]] = {}
    for name in full:
        slots.setdefault(int(name.split(".")[1]), []).append(name)
    sums = [_products(ours, full, slots[slot]) for slot in sorted(slots)]
    total = (sum(s[0] for s in sums), sum(s[1] for s in sums), sum(s[2] for s in sums))
    return GradientMatch(
        cosine=_cosine(*total),
        norm_ratio=_ratio(*total),
        cosine_by_block=tuple(_cosine(*s) for s in sums),
        norm_ratio_by_block=tuple(_ratio(*s) for s in sums),
    )


def _gradients(network: nn.Module, named: Mapping[str, nn.Parameter], batches: Sequence[Batch]) -> dict[str, Tensor]:
    if not batches:
        raise EmulatorError("adapter gradients are compared on text: give calibration text")
    device = next(network.parameters()).device
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    tokens = 0
    with frozen(network), evaluating(network), torch.enable_grad():
        for parameter in named.values():
            parameter.requires_grad_(True)
        for batch in batches:
            nats, count = objective_of(network).nll(network, {n: value.to(device) for n, value in batch.items()})
            found = torch.autograd.grad(nats, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.float()
            tokens += count
    return {name: gradient / max(1, tokens) for name, gradient in total.items()}


def _products(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> tuple[float, float, float]:
    """``a'b``, ``a'a`` and ``b'b`` over the tensors named."""
    flat = [(a[name].double().flatten(), b[name].double().flatten()) for name in names]
    return sum(float(x @ y) for x, y in flat), sum(float(x @ x) for x, _ in flat), sum(float(y @ y) for _, y in flat)


def _cosine(ab: float, aa: float, bb: float) -> float:
    return ab / math.sqrt(aa * bb) if aa and bb else 0.0


def _ratio(_: float, aa: float, bb: float) -> float:
    return math.sqrt(aa / bb) if bb else math.inf
