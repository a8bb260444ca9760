"""One forward pass of either network, and the hidden state behind its middle."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from offsite_fl.emulators.student import state_of
from offsite_fl.errors import ModelError


class _Reached(Exception):
    """Ends a forward pass behind the middle, where nobody asked for logits."""


def passed(
    model: nn.Module, last: nn.Module, batch: Mapping[str, Tensor], *, logits: bool
) -> tuple[Tensor, Tensor | None]:
    """What the block ``last`` returns, ``[B, T, hidden]``, and with ``logits`` the model's ``[B, T, vocabulary]``.

    One forward pass; without ``logits`` nothing behind ``last`` runs. ``batch`` has ``input_ids`` and
    ``attention_mask`` on the model's device.
    """
    seen: dict[str, Tensor] = {}

    def leaving(_: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = state_of(output)
        if not logits:
            raise _Reached

    hook = last.register_forward_hook(leaving)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = None
    try:
        with suppress(_Reached):
            output = model(**inputs, use_cache=False)
    finally:
        hook.remove()
    if "hidden" not in seen:
        raise ModelError(f"the forward pass of {type(model).__name__} didn't reach its last middle block")
    return seen["hidden"], None if output is None else output.logits
