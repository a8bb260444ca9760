"""How alike two representations are: pooled hidden states of the full model, one row an example, and linear CKA.

From CRaSh (arXiv 2310.15477): blocks whose outputs are alike on public text do much the same work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.streams import Stream, TextBatch, merged, passing_through, read_batches, working_copy
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import evaluating
from offsite_fl.models.blocks import block_list
from offsite_fl.models.caching import no_cache

Pooling = Literal["mean", "max", "max_nonpad", "last", "mean_all", "mean_weighted"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
_WHY = "comparing blocks by their pooled states"


class _Read(Exception):
    """Ends the forward pass at the head, whose input is all that was wanted."""


def pooled_states(context: Context, pooling: Pooling = "mean_weighted") -> list[Tensor]:
    """What each block of the full model hands on, pooled over the tokens of each calibration example.

    One forward pass. The state behind the last block is taken as the head reads it, so after the final norm where the
    model has one; Hugging Face counts it so.

    Args:
        context: its ``calibration`` is read; ``EmulatorError`` without.
        pooling: see :func:`pool`.

    Returns:
        One tensor [examples, hidden] a block in forward order, fp64, on the CPU.
    """
    batches = read_batches(context, context.need_calibration(_WHY))
    stream = Stream.entering(batches)
    states = []
    for position in context.track(range(context.blocks.depth), "pooled states"):
        stream = stream.through(working_copy(context.block(position), context.device), position)
        if position == context.blocks.depth - 1:
            stream = Stream(batches, list(_read_by_the_head(context, stream)))
        states.append(_pooled(stream, pooling))
    return states


def entering_state(context: Context, pooling: Pooling = "mean_weighted") -> Tensor:
    """The state in front of block 0 pooled likewise: [examples, hidden], fp64, on the CPU."""
    return _pooled(Stream.entering(read_batches(context, context.need_calibration(_WHY))), pooling)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector for each example out of one for each token.

    Args:
        hidden: [B, T, hidden].
        mask: [B, T] bool, False where there is padding.
        pooling: ``mean`` and ``max_nonpad`` over the real tokens, ``mean_all`` and ``max`` over padding too, ``last``
            the last real token, ``mean_weighted`` the mean over real tokens weighted by their place, 1 to T:
            ``sum_t t * mask_t * h_t / sum_t t * mask_t``.

    Returns:
        [B, hidden], fp64.
    """
    states = hidden.double()
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    if pooling == "max":
        return states.amax(1)
    if pooling == "max_nonpad":
        return states.masked_fill(~mask.unsqueeze(-1), -math.inf).amax(1)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), places.argmax(1)]
    weights = {"mean": mask, "mean_all": torch.ones_like(mask), "mean_weighted": places}.get(pooling)
    if weights is None:
        raise EmulatorError(f"unknown pooling {pooling!r}; there are {', '.join(POOLINGS)}")
    # What stands at padding counts for nothing, whatever it is.
    states = states.masked_fill((weights == 0).unsqueeze(-1), 0.0)
    return (states * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same examples, between 0 and 1.

    ``HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))`` with ``HSIC(X, Y) = sum(H X X' H .* H Y Y' H)`` and
    ``H = I - 11'/B``. Rotations and scaling of either side change nothing. Two examples tell nothing: it is 1 for any
    two of them. ``EmulatorError`` if all examples look alike on one side, or something isn't finite.

    Args:
        x: [B, features].
        y: [B, features of its own].

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    >>> round(linear_cka(x, x[:, [1, 0]] * 5), 6)
    1.0
    """
    a, b = _centred_gram(x), _centred_gram(y)
    # Norms first: products of two HSICs of large states could overflow.
    sizes = float(a.norm()), float(b.norm())
    if not all(map(math.isfinite, sizes)):
        raise EmulatorError("linear CKA: the states aren't finite on the calibration text; is the model's dtype fp16?")
    if not all(sizes):
        raise EmulatorError(
            f"linear CKA compares how examples differ, and {len(x)} calibration example(s) that all look alike don't: "
            "give several different ones"
        )
    return float(((a / sizes[0]) * (b / sizes[1])).sum())


def _centred_gram(x: Tensor) -> Tensor:
    """``H X X' H`` [B, B] in fp64; exactly zero where the rows differ by no more than rounding."""
    exact = x.double()
    centred = exact - exact.mean(0)
    if centred.norm() <= 1e-12 * exact.norm():
        return torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    return centred @ centred.T


def _pooled(stream: Stream, pooling: Pooling) -> Tensor:
    pairs = zip(stream.batches, stream.hidden, strict=True)
    return torch.cat([pool(hidden, _mask(batch, hidden), pooling).cpu() for batch, hidden in pairs])


def _mask(batch: TextBatch, hidden: Tensor) -> Tensor:
    shape = hidden.shape[:2]
    kept = batch.kept
    return torch.ones(shape, dtype=torch.bool, device=hidden.device) if kept is None else kept.view(shape)


@torch.no_grad()
def _read_by_the_head(context: Context, stream: Stream) -> Iterator[Tensor]:
    """The state behind the last block as the model's head reads it; as it is if the model has no head."""
    getter: Any = getattr(context.model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    for inputs, hidden in zip(merged(context.calibration), stream.hidden, strict=True):
        yield hidden if head is None else _in_front_of(head, context, inputs, hidden)


def _in_front_of(head: nn.Module, context: Context, inputs: Batch, hidden: Tensor) -> Tensor:
    seen = [hidden]
    stack = block_list(context.model, context.blocks)
    home = next(context.model.parameters()).device

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        state = hidden.to(home)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else next(iter(kwargs.values()))]
        raise _Read

    moved = {name: value.to(home) for name, value in inputs.items() if name != "labels"}
    with suppress(_Read), evaluating(context.model), passing_through(stack):
        handles = [
            stack[-1].register_forward_hook(leave),
            head.register_forward_pre_hook(read, with_kwargs=True),
        ]
        try:
            context.model(**moved, **no_cache(context.model))
        finally:
            for handle in handles:
                handle.remove()
    return seen[0].to(hidden.device)
