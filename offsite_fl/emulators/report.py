"""What an emulator costs and what it gives away, measured by the owner before anything leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.budget import count_parameters, stored_bytes
from offsite_fl.emulators.streams import Stream, read_batches, working_copy
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.network import NetworkPlan, build_network, fill_network, plan_network, shared_tensors
from offsite_fl.models.plug import adapter_tensors

# Calibration tokens that hidden error and perplexity are measured on: enough for two digits, seconds on a CPU.
MEASURED_TOKENS = 2048


@dataclass(frozen=True)
class EmulatorReport:
    """Size, exposure and quality of an emulator.

    ``bytes`` and ``parameters`` count each emulator block once, in the dtypes it holds (packed weights and their scales
    are bytes but no parameters). ``middle_*`` are the same for the blocks that it stands for, ``full_*`` for the whole
    model. ``verbatim_share`` is the share of the full model's parameters that leave unchanged: adapter, everything
    outside the blocks, and the emulator tensors that equal the owner's. ``flops_share`` is forward FLOPs of the
    emulated middle against the middle on one batch. ``hidden_error`` is ``||T - S||^2 / ||T||^2`` behind the middle
    (full model T, emulated S, padding left out), ``perplexity`` that of adapter + emulator, both on calibration text
    and None without. ``seconds`` is what building took; None if nobody timed it. ``notes`` say what didn't come out as
    asked for, a missed budget for one.
    """

    bytes: int
    parameters: int
    middle_bytes: int
    middle_parameters: int
    full_bytes: int
    full_parameters: int
    verbatim_share: float
    flops_share: float
    hidden_error: float | None
    perplexity: float | None
    seconds: float | None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EmulatorReport | None:
        """The report that ``dataclasses.asdict`` and JSON made of one; None of an empty object."""
        return cls(**{**data, "notes": tuple(data.get("notes", ()))}) if data else None


def emulator_report(
    emulator: Emulator, context: Context, *, tokens: int = MEASURED_TOKENS, seconds: float | None = None
) -> EmulatorReport:
    """Measure ``emulator``; the full model is read only.

    Args:
        emulator: what a method returned.
        context: the one it was built with.
        tokens: about how many calibration tokens hidden error and perplexity are measured on.
        seconds: how long the build took, if known.
    """
    modules = [block.module for block in emulator.blocks]
    middle = [context.block(index) for index in context.middle]
    batches = _head(context.calibration, tokens)
    error = hidden_error(emulator, context, batches) if batches else None
    perplexity = evaluate_loss(emulated_network(emulator, context), batches).perplexity if batches else None
    return EmulatorReport(
        bytes=stored_bytes(modules),
        parameters=count_parameters(modules),
        middle_bytes=stored_bytes(middle),
        middle_parameters=count_parameters(middle),
        full_bytes=stored_bytes([context.model]),
        full_parameters=count_parameters([context.model]),
        verbatim_share=verbatim_share(emulator, context),
        flops_share=flops_share(emulator, context),
        hidden_error=error,
        perplexity=perplexity,
        seconds=seconds,
        notes=emulator.notes,
    )


def verbatim_share(emulator: Emulator, context: Context) -> float:
    """Share of the full model's parameters that leaves the owner's house unchanged.

    Adapter blocks and everything outside the blocks always do. An emulator tensor counts if it equals, element for
    element, the tensor of the same name in the block that it was made from; each of the owner's tensors counts once.
    """
    leaving: dict[int, int] = {}
    for index in context.adapter:
        leaving.update({id(p): p.numel() for p in context.block(index).parameters()})
    named = dict(context.model.named_parameters())
    for name in shared_tensors(context.model, context.blocks):
        parameter = named.get(name.removeprefix("shared."))
        if parameter is not None:
            leaving[id(parameter)] = parameter.numel()
    for block in emulator.blocks:
        own = dict(context.block(block.origin).named_parameters())
        for name, tensor in block.module.named_parameters():
            if name in own and _same(tensor, own[name]):
                leaving[id(own[name])] = tensor.numel()
    return sum(leaving.values()) / count_parameters([context.model])


@torch.no_grad()
def hidden_error(emulator: Emulator, context: Context, batches: Sequence[Batch]) -> float:
    """``||T - S||^2 / ||T||^2`` behind the last middle block, over all real tokens of ``batches``.

    T is the full model's hidden state there, S that of adapter + emulator.
    """
    full = Stream.entering(read_batches(context, batches))
    emulated = full
    for position in range(context.middle[-1] + 1):
        own = working_copy(context.block(position), context.device)
        together = full is emulated and position in context.adapter
        full = full.through(own, position)
        if together:
            emulated = full
        elif position in context.adapter:
            emulated = emulated.through(own, position)
        elif position in emulator.layout:
            # Called as its origin is: by origins go the windows and rotary tables of the network that clients build.
            block = emulator.blocks[emulator.layout[position]]
            emulated = emulated.through(working_copy(block.module, context.device), block.origin)
    wrong, size = 0.0, 0.0
    for batch, t, s in zip(full.batches, full.hidden, emulated.hidden, strict=True):
        wrong += float(batch.rows(t.double() - s.double()).square().sum())
        size += float(batch.rows(t.double()).square().sum())
    return wrong / size


@torch.no_grad()
def flops_share(emulator: Emulator, context: Context) -> float:
    """Forward FLOPs (matrix products and attention) of the emulated middle over those of the middle, on one batch."""
    probe = context.calibration[:1] or (_synthetic_batch(),)
    stream = Stream.entering(read_batches(context, probe))

    def flops(places: Iterable[tuple[int, nn.Module]]) -> int:
        # The state that enters block 0 serves for all: only its shape matters here.
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            for position, block in places:
                stream.through(working_copy(block, context.device), position)
        return int(counter.get_total_flops())

    emulated = flops((position, emulator.at(position)) for position in emulator.positions)
    return emulated / flops((position, context.block(position)) for position in context.middle)


def emulated_network(emulator: Emulator, context: Context) -> nn.Module:
    """Adapter + emulator as a data owner will run it, in eval mode; shares its memory with the owner's tensors."""
    return planned_network(emulator, context)[0]


def planned_network(emulator: Emulator, context: Context) -> tuple[nn.Module, NetworkPlan]:
    """:func:`emulated_network` and the plan that it was built from; no parameter requires a gradient."""
    modules = [block.module for block in emulator.blocks]
    origins = [block.origin for block in emulator.blocks]
    plan = plan_network(context.model, context.blocks, context.adapter, emulator.layout, modules, origins)
    tensors = dict(adapter_tensors(context.model, context.blocks, context.adapter))
    named: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items()}
    named.update(shared_tensors(context.model, context.blocks))
    for slot, module in enumerate(modules):
        named.update({f"emulator.{slot}.{name}": tensor for name, tensor in module.state_dict().items()})
    network = build_network(plan)
    fill_network(network, plan, named)
    return network.requires_grad_(False), plan


def _head(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches that together hold at least ``tokens`` tokens, or all."""
    head: list[Batch] = []
    for batch in batches:
        if sum(b["input_ids"].numel() for b in head) >= tokens:
            break
        head.append(batch)
    return head


def _synthetic_batch(length: int = 64) -> Batch:
    ids = torch.zeros(1, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# torch counts attention on GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
