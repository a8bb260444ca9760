"""One forward pass of either network, and the hidden states behind some of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from offsite_fl.emulators.student import state_of
from offsite_fl.errors import ModelError


class _Reached(Exception):
    """Ends a forward pass behind the last block that is looked at, where nobody asked for logits."""


def passed(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Tensor], *, logits: bool
) -> tuple[list[Tensor], Tensor | None]:
    """What each of ``blocks`` returns, ``[B, T, hidden]``, and with ``logits`` the model's ``[B, T, vocabulary]``.

    One forward pass; without ``logits`` nothing behind the last of the blocks runs. ``batch`` has ``input_ids`` and
    ``attention_mask`` on the model's device.
    """
    seen: dict[int, Tensor] = {}
    wanted = {id(block) for block in blocks}

    def leaving(block: nn.Module, args: Any, output: Any) -> None:
        seen[id(block)] = state_of(output)
        if not logits and seen.keys() == wanted:
            raise _Reached

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = None
    with ExitStack() as hooks, suppress(_Reached):
        for block in {id(block): block for block in blocks}.values():
            hooks.callback(block.register_forward_hook(leaving).remove)
        output = model(**inputs, use_cache=False)
    if seen.keys() != wanted:
        raise ModelError(f"the forward pass of {type(model).__name__} didn't reach its last middle block")
    return [seen[id(block)] for block in blocks], None if output is None else output.logits
