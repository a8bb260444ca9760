"""What the linears of a block do, found by watching them run: who shares an input, who writes to the residual stream.

No module names are used, so the same code serves every family: attention and MLP one after the other (LLaMA, GPT-2,
OPT) or in parallel (GPT-NeoX, Phi).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, is_linear, linear_weight
from offsite_fl.models.walk import BlockCall, call_block

# More candidates than this for the residual stream's writers means a block of an unknown kind: don't try all subsets.
MAX_WRITERS = 6


@dataclass(frozen=True)
class BlockPlan:
    """The linears of a block by what they do.

    ``groups`` are those that run once, by execution order; the members of a group read the same tensor. ``writers`` are
    the linears whose outputs, added to the block's input, are the block's output, at most one a group, in the order of
    the groups; empty if the block isn't such a sum. ``others`` run never or several times.
    """

    groups: tuple[tuple[str, ...], ...]
    writers: tuple[str, ...]
    others: tuple[str, ...]


@dataclass
class Taps:
    """Tensors seen on the way through a block, by module path; ``state`` is None if the pass was cut short."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None


class _SeenEnough(Exception):
    """Ends a partial forward pass once everything asked for was seen."""


def dense_linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dense linears with their paths, without the parts of what has already been replaced; a harmonizer has none."""
    if isinstance(block, Harmonizer):
        return
    done = [p + "." for p, m in block.named_modules() if isinstance(m, (LowRankLinear, QuantizedLinear))]
    for path, module in block.named_modules():
        if is_linear(module) and not path.startswith(tuple(done)):
            yield path, module


def kind_of(block: nn.Module) -> tuple[object, ...]:
    """What blocks have in common whose linears do the same: their class, and the paths and shapes of dense linears."""
    return (type(block), *((path, linear_weight(linear).shape) for path, linear in dense_linears(block)))


@torch.no_grad()
def run_tapped(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    *,
    inputs: Collection[str] = (),
    outputs: Collection[str] = (),
    partial: bool = False,
) -> Taps:
    """Run ``block`` and note the ``inputs`` and ``outputs`` of the modules at these paths.

    With ``partial`` the pass ends as soon as all of them were seen, so that nothing behind them is computed.
    """
    taps = Taps()

    def enough() -> None:
        if partial and taps.inputs.keys() >= set(inputs) and taps.outputs.keys() >= set(outputs):
            raise _SeenEnough

    def before(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            taps.inputs[path] = _first(args, kwargs)
            enough()

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            taps.outputs[path] = output
            enough()

        return hook

    handles = [block.get_submodule(p).register_forward_pre_hook(before(p), with_kwargs=True) for p in inputs]
    handles += [block.get_submodule(p).register_forward_hook(after(p)) for p in outputs]
    try:
        with contextlib.suppress(_SeenEnough):
            taps.state = call_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return taps


@torch.no_grad()
def plan_block(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    rows: Callable[[Tensor], Tensor],
    linears: Collection[tuple[str, nn.Module]] | None = None,
) -> BlockPlan:
    """Run ``block`` once on ``hidden`` [B, T, hidden] and say what its linears do; ``rows`` leaves padding out.

    ``linears`` are those to watch, with their paths: the dense ones unless others are named.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen.append((path, _first(args, kwargs), output))

        return hook

    linears = list(dense_linears(block)) if linears is None else linears
    handles = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in linears]
    try:
        state = call_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    order = [path for path, _, _ in seen]
    once = [entry for entry in seen if order.count(entry[0]) == 1]
    groups: list[tuple[Tensor, list[str]]] = []
    for path, x, _ in once:
        same = next((members for tensor, members in groups if tensor is x), None)
        if same is None:
            groups.append((x, [path]))
        else:
            same.append(path)
    ordered = tuple(tuple(members) for _, members in groups)
    others = tuple(path for path, _ in linears if order.count(path) != 1)
    update = rows(state.float() - hidden.float())
    written = {path: y.reshape(hidden.shape) for path, _, y in once if y.numel() == hidden.numel()}
    # Of each part of the block (attention, MLP) only the last linear can write.
    last = {path.rpartition(".")[0]: path for path, _, _ in once}
    candidates = {path: rows(written[path]).float() for path in last.values() if path in written}
    tolerance = _tolerance(hidden.dtype, update, rows(hidden))
    return BlockPlan(ordered, _writers(candidates, ordered, update, tolerance), others)


def _writers(
    candidates: dict[str, Tensor], groups: tuple[tuple[str, ...], ...], update: Tensor, tolerance: float
) -> tuple[str, ...]:
    """The largest set of candidates, one a group, whose sum is the block's update."""
    place = {path: index for index, group in enumerate(groups) for path in group}
    paths = sorted(candidates, key=place.__getitem__)
    if len(paths) > MAX_WRITERS:
        return ()
    for size in range(len(paths), 0, -1):
        for chosen in combinations(paths, size):
            distinct = len({place[path] for path in chosen}) == size
            if distinct and float((sum(candidates[p] for p in chosen) - update).norm()) <= tolerance:
                return chosen
    return ()


def _tolerance(dtype: torch.dtype, update: Tensor, hidden: Tensor) -> float:
    """How far a sum may be off and still count as equal: rounding of the update and of the residual stream."""
    eps = torch.finfo(dtype).eps
    return max(1e-3, 16 * eps) * float(update.norm()) + 2 * eps * float(hidden.float().norm())


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value
