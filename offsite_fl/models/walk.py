"""Run single blocks of a model outside it, with the very arguments that the model's own forward pass gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import Blocks, block_list
from offsite_fl.models.caching import no_cache


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides the hidden state: positions, its own attention mask, rotary tables.

    ``hidden`` is the state ``[B, T, hidden]`` that enters block 0; it is ``None`` for all later blocks. ``args`` are
    the positional arguments after the hidden state (BLOOM passes its alibi so).
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    hidden: torch.Tensor | None = None


class _AllSeen(Exception):
    """Ends the forward pass when the last block's arguments are known, before it, the norm and the head run."""


@torch.no_grad()
def capture_calls(model: nn.Module, blocks: Blocks, batch: Mapping[str, torch.Tensor]) -> list[BlockCall]:
    """Run ``batch`` through the model once, in eval mode without a cache, and note how each block is called.

    Parameters
    ----------
    model
        A whole model with weights, wrapped or not. Its mode and weights are left as they were.
    blocks
        From :func:`~offsite_fl.models.blocks.find_blocks`.
    batch
        ``input_ids`` and, for padded rows, ``attention_mask``, both ``[B, T]``; ``labels`` are ignored.

    Returns
    -------
    list of BlockCall
        One a block, in forward order. Masks hold for batches of this shape and padding only.

    Raises
    ------
    ModelError
        If the forward pass doesn't go through the blocks one after the other.
    """
    stack = block_list(model, blocks)
    calls: list[BlockCall] = []

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index != len(calls):
                raise ModelError(f"block {index} of {blocks.path!r} ran when block {len(calls)} was due")
            calls.append(_call(args, kwargs, first=index == 0))
            if len(calls) == len(stack):
                raise _AllSeen

        return hook

    handles = [block.register_forward_pre_hook(note(i), with_kwargs=True) for i, block in enumerate(stack)]
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    try:
        model.eval()(**inputs, **no_cache(model))
    except _AllSeen:
        return calls
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    raise ModelError(f"the forward pass ran {len(calls)} of the {len(stack)} blocks of {blocks.path!r}")


def call_block(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """Run one block on ``hidden`` ``[B, T, hidden]`` and return what it hands to the next one, same shape.

    Walking all blocks of a model with its captured calls gives the states that its own forward pass computes.
    """
    output = block(hidden, *call.args, **call.kwargs)
    state = output[0] if isinstance(output, tuple) else output
    if not isinstance(state, torch.Tensor):
        raise ModelError(f"{type(block).__name__} returned {type(state).__name__} where a hidden state was expected")
    return state


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, first: bool) -> BlockCall:
    """Separate the hidden state from the rest; it comes first or by name."""
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    if not isinstance(hidden, torch.Tensor):
        raise ModelError("a block is called without a hidden state, neither first nor as hidden_states")
    return BlockCall(args[1:], rest, hidden if first else None)
