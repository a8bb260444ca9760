"""What a client makes of an emulator of a pico model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from offsite_fl.models.blocks import Blocks, find_blocks
from offsite_fl.models.network import NetworkPlan, build_network, fill_network, plan_network, shared_tensors
from offsite_fl.models.plug import adapter_tensors

Batch = dict[str, torch.Tensor]
ENDS = (0, 5)


def tensors_of(model: nn.Module, blocks: Blocks, adapter: Sequence[int], emulator: Sequence[nn.Module]) -> Batch:
    """Everything that leaves, under slot names: adapter, emulator, tensors outside the blocks."""
    tensors: Batch = {n: t.detach().clone() for n, t in adapter_tensors(model, blocks, adapter).items()}
    for slot, block in enumerate(emulator):
        tensors |= {f"emulator.{slot}.{n}": t.clone() for n, t in block.state_dict().items()}
    return tensors | {n: t.clone() for n, t in shared_tensors(model, blocks).items()}


def rebuilt(
    model: nn.Module,
    layout: Mapping[int, int],
    emulator: Sequence[nn.Module],
    origins: Sequence[int],
    adapter: Sequence[int] = ENDS,
) -> tuple[nn.Module, NetworkPlan]:
    """What a client makes of the plan's JSON and the tensors."""
    blocks = find_blocks(model)
    plan = plan_network(model, blocks, adapter, layout, emulator, origins)
    plan = NetworkPlan.from_json(json.loads(json.dumps(plan.to_json())))
    network = build_network(plan)
    fill_network(network, plan, tensors_of(model, blocks, adapter, emulator))
    return network, plan
