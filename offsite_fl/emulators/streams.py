"""Calibration text on its way through the blocks: the batches, how the model calls its blocks, the hidden states."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, copy_structure
from offsite_fl.errors import ModelError
from offsite_fl.models.walk import BlockCall, call_block, capture_calls


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


@dataclass
class _Known:
    calls: list[BlockCall]
    repeats: bool | None = None


@dataclass
class _Calls:
    """Captures how blocks are called, once for all batches of one shape and padding where that is enough.

    A capture costs a forward pass. Most models call their blocks alike for every batch of one shape and padding; the
    second such batch shows whether this one does (per-layer embeddings, for one, depend on the tokens).
    """

    context: Context
    known: dict[tuple[Any, ...], _Known] = field(default_factory=dict)

    def of(self, batch: Batch) -> list[BlockCall]:
        mask = batch.get("attention_mask")
        key = (tuple(batch["input_ids"].shape), None if mask is None else mask.cpu().numpy().tobytes())
        known = self.known.get(key)
        if known is not None and known.repeats:
            return [replace(known.calls[0], hidden=self._entry(batch)), *known.calls[1:]]
        calls = capture_calls(self.context.model, self.context.blocks, batch)
        if known is None:
            self.known[key] = _Known(calls)
        elif known.repeats is None:
            known.repeats = all(
                _equal((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs)))
                for a, b in zip(known.calls, calls, strict=True)
            )
        return calls

    def _entry(self, batch: Batch) -> Tensor:
        """The state that enters block 0, without running any block."""

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Entered(args[0] if args else kwargs["hidden_states"])

        handle = self.context.block(0).register_forward_pre_hook(leave, with_kwargs=True)
        try:
            capture_calls(self.context.model, self.context.blocks, batch)
        except _Entered as entered:
            return entered.hidden
        finally:
            handle.remove()
        raise ModelError(f"the forward pass doesn't enter {self.context.blocks.path}.0")


class _Entered(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def read_batches(context: Context, batches: Sequence[Batch]) -> list[TextBatch]:
    """How the full model calls its blocks on each batch, on the context's device."""
    calls, moved = _Calls(context), _Mover(torch.device(context.device))
    read = []
    for batch in batches:
        captured = [BlockCall(moved(c.args), moved(c.kwargs), moved(c.hidden)) for c in calls.of(batch)]
        mask = batch.get("attention_mask")
        kept = None if mask is None or bool(mask.all()) else mask.flatten().bool().to(context.device)
        read.append(TextBatch(captured, kept))
    return read


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


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a is b or a == b)


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
