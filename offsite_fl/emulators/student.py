"""The two sides of a distillation: the client's own network as the student, the full model's middle as the teacher.

Both start from the hidden state that enters the first middle place and end at the output of the last one; adapter
blocks in between, where a split has some, run in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.errors import EmulatorError, ModelError
from offsite_fl.evaluation.loss import evaluating
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.models.caching import no_cache
from offsite_fl.models.network import build_network, fill_network, place_blocks, plan_network, shared_tensors

REDUCED = (torch.bfloat16, torch.float16)


class _Reached(Exception):
    """Ends a forward pass at the last middle place, before what nobody asked for runs."""


class Student:
    """The network that clients will run, with the emulator's weights as fp32 copies that can be trained.

    ``parameters`` names them ``emulator.{block}.{path}``; everything else in the network is frozen and shares memory
    with the full model where the device is the same. ``dtypes`` are those the emulator came with; ``decayed`` are the
    weight matrices, ``biases`` the biases of linears and norms. The network is in eval mode (no dropout: the teacher is
    compared with exactly what clients run). Where the model itself is in half precision, it computes under bf16
    autocast.
    """

    def __init__(self, emulator: Emulator, context: Context) -> None:
        if not emulator.layout:
            raise EmulatorError("the emulator has no block left: there is nothing to train")
        self.device = torch.device(context.device)
        modules = [block.module for block in emulator.blocks]
        origins = [block.origin for block in emulator.blocks]
        plan = plan_network(context.model, context.blocks, context.adapter, emulator.layout, modules, origins)
        self.network = build_network(plan)
        fill_network(self.network, plan, _tensors(emulator, context))
        self.network.requires_grad_(False).to(self.device)
        self.parameters: dict[str, nn.Parameter] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.decayed: set[str] = set()
        self.biases: set[str] = set()
        places = place_blocks(self.network, plan)
        for block, place in zip(places, plan.layout, strict=True):
            if place.role == "emulator":
                self._train(block, modules[place.slot], place.prefix)
        before = sum(index < context.middle[0] for index in context.adapter)
        after = sum(index > context.middle[-1] for index in context.adapter)
        self.entry, self.exit = places[before], places[len(places) - after - 1]
        self.reduced = next(context.model.parameters()).dtype in REDUCED

    def _train(self, block: nn.Module, original: nn.Module, prefix: str) -> None:
        """Make the parameters of one emulator block trainable; a block at two places comes by twice, as one."""
        dtypes = {name: parameter.dtype for name, parameter in original.named_parameters()}
        for path, module in block.named_modules():
            for leaf, parameter in module.named_parameters(prefix=path, recurse=False):
                self.parameters[prefix + leaf] = parameter.requires_grad_(True)
                self.dtypes[prefix + leaf] = dtypes[leaf]
                # Weight matrices only: neither a bias nor the weight of a norm, whatever either is called.
                if parameter.ndim >= 2 and "norm" not in type(module).__name__.lower():
                    self.decayed.add(prefix + leaf)
                if leaf.rpartition(".")[2] == "bias":
                    self.biases.add(prefix + leaf)

    def forward(
        self, batch: Batch, *, with_loss: bool, leaf: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Run ``batch`` (on the student's device).

        Returns the hidden states ``[B, T, hidden]`` that enter the first middle place (without gradient) and leave
        the last, the summed loss in nats, and the number of predicted tokens. Without ``with_loss`` nothing behind the
        middle runs and the last two are None and 0. With ``leaf`` the first of them is a leaf from which the others
        were computed, so that gradients with respect to it can be had.
        """
        seen: dict[str, Tensor] = {}

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen["h"] = _hidden(args, kwargs).detach()
            return with_hidden(args, kwargs, seen["h"].requires_grad_()) if leaf else None

        def leaving(_: nn.Module, args: Any, output: Any) -> None:
            seen["s"] = state_of(output)
            if not with_loss:
                raise _Reached

        nats, tokens = None, 0
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.reduced)
        with hooked(self.entry, entering, self.exit, leaving), suppress(_Reached), autocast:
            if with_loss:
                nats, tokens = objective_of(self.network).nll(self.network, batch)
            else:
                self.network(**_inputs(batch), **no_cache(self.network))
        return seen["h"], seen["s"], nats, tokens


class Middle:
    """The full model and the two ends of its middle, with the device and the dtype that it works in."""

    def __init__(self, context: Context) -> None:
        self.model = context.model
        self.entry, self.exit = context.block(context.middle[0]), context.block(context.middle[-1])
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype


class Teacher(Middle):
    """The full model's middle, run on the hidden state that enters the student's."""

    @torch.no_grad()
    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """What the middle makes of ``hidden`` with the masks and positions of ``batch``; same shape, own device."""
        seen: dict[str, Tensor] = {}
        given = hidden.to(self.device, self.dtype)

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return with_hidden(args, kwargs, given)

        def leaving(_: nn.Module, args: Any, output: Any) -> None:
            seen["t"] = state_of(output)
            raise _Reached

        with hooked(self.entry, entering, self.exit, leaving), evaluating(self.model), suppress(_Reached):
            moved = {k: v.to(self.device) for k, v in _inputs(batch).items()}
            self.model(**moved, **no_cache(self.model))
        if "t" not in seen:
            raise ModelError(f"the forward pass of {type(self.model).__name__} didn't reach its last middle block")
        return seen["t"]


@contextmanager
def hooked(
    entry: nn.Module, entering: Callable[..., Any], last: nn.Module, leaving: Callable[..., Any]
) -> Iterator[None]:
    """``entering`` is called in front of ``entry`` and ``leaving`` behind ``last``, for the length of a ``with`` block.

    As torch's hooks: the first gets module, args and kwargs and may return other ones, the second the output too.
    """
    hooks = [entry.register_forward_pre_hook(entering, with_kwargs=True), last.register_forward_hook(leaving)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(emulator: Emulator, context: Context) -> dict[str, Tensor]:
    """All tensors of the client's network by slot name: the emulator's floating ones copied to fp32, the rest live."""
    device = torch.device(context.device)
    tensors = shared_tensors(context.model, context.blocks)
    for slot, index in enumerate(context.adapter):
        tensors |= {f"adapter.{slot}.{name}": t for name, t in context.block(index).state_dict().items()}
    for slot, block in enumerate(emulator.blocks):
        for name, tensor in block.module.state_dict().items():
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensors[f"emulator.{slot}.{name}"] = tensor.to(device, dtype, copy=True)
    return tensors


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ModelError("a block is called without a hidden state, neither first nor as hidden_states")
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with ``hidden`` as the state that enters it."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def state_of(output: Any) -> Tensor:
    """The hidden state in what a block returned: it comes alone or first in a tuple; ``ModelError`` if neither."""
    state = output[0] if isinstance(output, tuple) else output
    if not isinstance(state, Tensor):
        raise ModelError(f"a block returned {type(state).__name__} where a hidden state was expected")
    return state
