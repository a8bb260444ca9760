"""Calibration text on its way through the blocks: the batches, how the model calls its blocks, the hidden states."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, copy_structure
from offsite_fl.models.blocks import BlockList, block_list
from offsite_fl.models.walk import BlockCall, call_block, capture_calls

# Tokens in one pass: enough for matrix products at full speed, few enough for the widest activation of a large block.
MERGED_TOKENS = 2048


@dataclass(frozen=True)
class TextBatch:
    """One batch as the blocks see it: a call for each block of the full model, and which tokens aren't padding.

    ``kept`` is a bool mask [B * T], None when every token counts.
    """

    calls: Sequence[BlockCall]
    kept: Tensor | None

    @property
    def entry(self) -> Tensor:
        """The hidden state [B, T, hidden] that enters block 0."""
        hidden = self.calls[0].hidden
        assert hidden is not None
        return hidden

    def rows(self, x: Tensor) -> Tensor:
        """``x`` [..., features] as [real tokens, features]."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.kept is None else flat[self.kept]


def read_batches(context: Context, batches: Sequence[Batch]) -> list[TextBatch]:
    """How the full model calls its blocks on ``batches``, small ones merged, on the context's device."""
    moved = _Mover(torch.device(context.device))
    read = []
    for batch in merged(batches):
        with passing_through(block_list(context.model, context.blocks)):
            calls = capture_calls(context.model, context.blocks, batch)
        kept = _kept(batch, calls[0].hidden)
        kept = kept if kept is None else kept.to(context.device)
        read.append(TextBatch([BlockCall(moved(c.args), moved(c.kwargs), moved(c.hidden)) for c in calls], kept))
    return read


def merged(batches: Sequence[Batch], tokens: int = MERGED_TOKENS) -> list[Batch]:
    """Neighbouring batches of equal length put together as long as they hold at most ``tokens`` tokens."""
    groups: list[list[Batch]] = []
    for batch in batches:
        rows, length = len(next(iter(batch.values()))), batch_length(batch)
        last = groups[-1] if groups else []
        fits = last and {n: t.shape[1:] for n, t in last[0].items()} == {n: t.shape[1:] for n, t in batch.items()}
        if fits and (sum(len(next(iter(b.values()))) for b in last) + rows) * length <= tokens:
            last.append(batch)
        else:
            groups.append([batch])
    return [{name: torch.cat([batch[name] for batch in group]) for name in group[0]} for group in groups]


def first_examples(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Whole examples from the front that together hold at most ``tokens`` tokens, padding included, or the first."""
    taken: list[Batch] = []
    left = tokens
    for batch in batches:
        rows, length = len(next(iter(batch.values()))), batch_length(batch)
        fitting = min(rows, left // length)
        if fitting == 0:
            break
        taken.append({name: value[:fitting] for name, value in batch.items()})
        left -= fitting * length
    return taken or [{name: value[:1] for name, value in batches[0].items()}]


def batch_length(batch: Batch) -> int:
    """Tokens in a row of ``batch``; of a batch without tokens (images), the 256 that are usual."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    return ids.shape[1] if ids is not None else 256


def _kept(batch: Batch, hidden: Tensor | None) -> Tensor | None:
    """Which places of ``hidden`` [B, T, hidden] hold a token, flat; None if all do or nothing tells."""
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    # Images and pooled texts have other places than the mask: all of them count then.
    if mask is None or hidden is None or mask.shape != hidden.shape[:2] or bool(mask.all()):
        return None
    return mask.flatten().bool()


@contextmanager
def passing_through(blocks: BlockList) -> Iterator[None]:
    """Blocks behind the first hand their input on, for the length of a ``with`` block.

    How a model calls its blocks doesn't depend on the hidden states, so capturing the calls needn't cost a forward
    pass. The first block runs, to show what else a block of this kind returns.
    """
    shape: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        shape[:] = [run_first(*args, **kwargs)]
        return shape[0]

    def other(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *shape[0][1:]) if isinstance(shape[0], tuple) else hidden

    run_first = blocks[0].forward
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = other if index else first
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


class _Mover:
    """Moves the tensors in nested arguments to a device, each tensor once (blocks share masks and rotary tables)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._moved:
                # The original is kept as well: its id may not be given to another tensor meanwhile.
                self._moved[id(value)] = (value, value.to(self.device))
            return self._moved[id(value)][1]
        if isinstance(value, Mapping):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self(item) for item in value)
        return value


def working_copy(block: nn.Module, device: str) -> nn.Module:
    """``block`` in eval mode on ``device``, free to have its linears replaced.

    Where it lies there already the copy shares the weights; moving a shared parameter would move the owner's.
    """
    here = next(block.parameters()).device
    if here == torch.empty(0, device=device).device:
        return copy_structure(block).eval()
    return copy.deepcopy(block).to(device).eval()


def sent_home(block: nn.Module, context: Context) -> nn.Module:
    """A finished working copy, back on the device of the full model."""
    home = next(context.model.parameters()).device
    return block if next(block.parameters()).device == home else block.to(home)


class Stream:
    """The hidden states of all batches at one place between two blocks."""

    def __init__(self, batches: Sequence[TextBatch], hidden: Sequence[Tensor]) -> None:
        self.batches, self.hidden = batches, list(hidden)

    @classmethod
    def entering(cls, batches: Sequence[TextBatch]) -> Stream:
        """The stream in front of block 0."""
        return cls(batches, [batch.entry for batch in batches])

    @torch.no_grad()
    def through(self, block: nn.Module, position: int) -> Stream:
        """The stream behind ``block``, called as the full model calls its block at ``position``."""
        pairs = zip(self.batches, self.hidden, strict=True)
        return Stream(self.batches, [call_block(block, hidden, batch.calls[position]) for batch, hidden in pairs])


def running_order(adapter: Sequence[int], places: Sequence[int], depth: int) -> list[tuple[int, int]]:
    """Positions at which the emulated network runs a block, up to the last of ``places``, each with the next one.

    Full-model blocks between the two were dropped; ``depth`` stands for the end of the model.

    >>> running_order((0, 5), (1, 3), 6)
    [(0, 1), (1, 3), (3, 5)]
    """
    positions = sorted({*adapter, *places})
    pairs = zip(positions, [*positions[1:], depth], strict=True)
    return [(here, behind) for here, behind in pairs if here <= max(places)]
