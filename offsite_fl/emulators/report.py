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
from offsite_fl.emulators.streams import Stream, batch_length, read_batches, working_copy
from offsite_fl.emulators.verbatim import verbatim_share
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.network import (
    NetworkPlan,
    adapter_parameters,
    build_network,
    fill_network,
    plan_network,
    shared_tensors,
)
from offsite_fl.models.probe import probe_batch
from offsite_fl.models.tasks import NEXT_TOKEN, task_of

# Calibration tokens that hidden error and perplexity are measured on: enough for two digits, seconds on a CPU.
MEASURED_TOKENS = 2048


@dataclass(frozen=True)
class EmulatorReport:
    """Size, exposure and quality of an emulator.

    ``bytes`` and ``parameters`` count each emulator block once, in the dtypes it holds (packed weights and their scales
    are bytes but no parameters). ``middle_*`` are the same for the blocks that it stands for, ``full_*`` for the whole
    model. ``verbatim_share`` is the share of the full model's parameters that leave unchanged: adapter, everything
    outside the blocks, and of the emulator the entries, rows and columns that are the owner's, bit for bit.
    ``flops_share`` is forward FLOPs of the emulated middle against the middle on one batch; None without calibration
    data where the model's forward pass wants more than the smallest batch has. ``hidden_error`` is
    ``||T - S||^2 / ||T||^2`` behind the middle (full model T, emulated S, padding left out), ``perplexity`` that of
    adapter + emulator, both on calibration text and None without (perplexity also where the model predicts no next
    token). ``seconds`` is what building took; None if nobody timed it. ``notes`` say what didn't come out as asked for,
    a missed budget for one.
    """

    bytes: int
    parameters: int
    middle_bytes: int
    middle_parameters: int
    full_bytes: int
    full_parameters: int
    verbatim_share: float
    flops_share: float | None
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
    text = batches and task_of(context.model) in (*NEXT_TOKEN, None)
    perplexity = evaluate_loss(emulated_network(emulator, context), batches).perplexity if text else None
    return EmulatorReport(
        bytes=stored_bytes(modules),
        parameters=count_parameters(modules),
        middle_bytes=stored_bytes(middle),
        middle_parameters=count_parameters(middle),
        full_bytes=stored_bytes([context.model]),
        full_parameters=count_parameters([context.model]),
        verbatim_share=verbatim_share(emulator, context),
        flops_share=_flops_share(emulator, context),
        hidden_error=error,
        perplexity=perplexity,
        seconds=seconds,
        notes=emulator.notes,
    )


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
    probe = context.calibration[:1] or (probe_batch(context.model, length=64),)
    stream = Stream.entering(read_batches(context, probe))

    def flops(places: Iterable[tuple[int, nn.Module]]) -> int:
        # The state that enters block 0 serves for all: only its shape matters here.
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            for position, block in places:
                stream.through(_frozen(working_copy(block, context.device)), position)
        return int(counter.get_total_flops())

    emulated = flops((position, emulator.at(position)) for position in emulator.positions)
    return emulated / flops((position, context.block(position)) for position in context.middle)


def _flops_share(emulator: Emulator, context: Context) -> float | None:
    """:func:`flops_share`; None without calibration data where the model doesn't take the batch made up for it."""
    if context.calibration:
        return flops_share(emulator, context)
    try:
        return flops_share(emulator, context)
    except Exception:  # a forward pass that wants more than one input may fail in any way
        return None


def _frozen(block: nn.Module) -> nn.Module:
    """``block`` with parameters of its own that need no gradient, on the same memory.

    The counter follows gradients of what modules are called with, and there are none here (DBRX hands weights on).
    """
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
    return block


def emulated_network(emulator: Emulator, context: Context) -> nn.Module:
    """Adapter + emulator as a data owner will run it, in eval mode; shares its memory with the owner's tensors."""
    return planned_network(emulator, context)[0]


def planned_network(emulator: Emulator, context: Context) -> tuple[nn.Module, NetworkPlan]:
    """:func:`emulated_network` and the plan that it was built from; no parameter requires a gradient."""
    modules = [block.module for block in emulator.blocks]
    origins = [block.origin for block in emulator.blocks]
    plan = plan_network(
        context.model, context.blocks, context.adapter, emulator.layout, modules, origins, head=context.head
    )
    named: dict[str, Tensor] = dict(shared_tensors(context.model, context.blocks, context.head))
    for slot, index in enumerate(sorted(context.adapter)):
        # Buffers too: DeepSeek's router keeps a correction in one.
        named.update({f"adapter.{slot}.{name}": t for name, t in context.block(index).state_dict().items()})
    for slot, module in enumerate(modules):
        named.update({f"emulator.{slot}.{name}": tensor for name, tensor in module.state_dict().items()})
    network = build_network(plan)
    fill_network(network, plan, named)
    return network.requires_grad_(False), plan


def private_network(
    emulator: Emulator, context: Context, values: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, NetworkPlan]:
    """:func:`planned_network` with an adapter of its own, which may be trained or written to.

    It holds copies of ``values`` by slot name, in their dtype, or of the full model's (None). Everything else shares
    the owner's memory and must stay frozen.
    """
    network, plan = planned_network(emulator, context)
    for name, parameter in adapter_parameters(network, plan).items():
        value = parameter if values is None else values[name]
        parameter.data = value.detach().to(parameter.device, copy=True)
    return network, plan


def _head(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches that together hold at least ``tokens`` tokens, or all."""
    head: list[Batch] = []
    for batch in batches:
        if sum(len(next(iter(b.values()))) * batch_length(b) for b in head) >= tokens:
            break
        head.append(batch)
    return head


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# torch counts attention on GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
