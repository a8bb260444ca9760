"""Which emulators can be made of a model at all, told by its task and its blocks before any weight is read."""

from __future__ import annotations

from torch import nn

from offsite_fl.models.blocks import Blocks, block_list
from offsite_fl.models.linears import named_linears
from offsite_fl.models.overrides import NO_UNITS
from offsite_fl.models.tasks import CLASSIFICATION, NEXT_TOKEN, task_of

# Methods that take the model's loss, or its gradient, on calibration data; the second only that of the next token.
BY_LOSS = frozenset({"distill", "gradient-match", "gradot", "loss-margin", "scaleot"})
BY_NEXT_TOKEN = frozenset({"loss-margin"})
# Methods that put something else in the place of dense linears.
BY_LINEARS = frozenset({"gradot", "low-rank", "prune", "quantize", "smooth"})
# Methods that, as they are by default, take whole channels and heads out of blocks.
BY_UNITS = frozenset({"prune"})


def why_not(name: str, model: nn.Module, blocks: Blocks) -> str | None:
    """Why the emulator ``name`` can't be made of ``model``, which may lie on meta; None if nothing speaks against it.

    Only what structure tells: a method may still refuse when it is built, and then says why.
    """
    task = task_of(model)
    if name in BY_NEXT_TOKEN and task is not None and task not in NEXT_TOKEN:
        return f"it needs the next-token loss, which a model for {task} doesn't have"
    if name in BY_LOSS and task is not None and task not in (*NEXT_TOKEN, *CLASSIFICATION):
        return f"it needs the next-token loss or that of classes, which a model for {task} doesn't have here"
    if name in BY_LINEARS and not any(True for block in block_list(model, blocks) for _ in named_linears(block)):
        return f"no {blocks.cls} holds a dense linear layer"
    if name in BY_UNITS and getattr(getattr(model, "config", None), "model_type", None) in NO_UNITS:
        return f"no {blocks.cls} has an MLP channel or an attention head that can be taken out; mode=magnitude can do"
    return None
