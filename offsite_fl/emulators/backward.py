"""The full model's gradients, one block at a time: what a block's linears read, and the gradient at their outputs.

One pass forward keeps the hidden state in front of every block, then the blocks are run again from the last to the
first, each with the gradient that arrives behind it. So the memory is that of the hidden states and of one block,
whatever the depth, and no gradient of a weight is made unless the caller makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.streams import Stream, TextBatch, merged, passing_through, read_batches, working_copy
from offsite_fl.evaluation.loss import plain_head
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.models.blocks import block_list
from offsite_fl.models.tasks import need_loss
from offsite_fl.models.walk import BlockCall, call_block


@dataclass
class Watched:
    """One linear of a block on one batch: ``inputs`` [..., in] and the loss's gradient at ``outputs`` [..., out]."""

    inputs: Tensor
    gradient: Tensor


class BackwardPass:
    """The summed loss of the full model on some batches, of next tokens or of classes, walked back from the last block.

    ``positions`` run from the last block to block 0; :meth:`back` must be called for each in this order. ``tokens`` is
    the number of predicted tokens (of a classifier, of examples), ``loss`` the mean loss in nats.
    """

    def __init__(self, context: Context, batches: Sequence[Batch], description: str) -> None:
        need_loss(context.model)
        self.context = context
        self.batches: list[TextBatch] = read_batches(context, batches)
        self._inputs = merged(batches)
        self.tokens, nats = 0, 0.0
        streams = [Stream.entering(self.batches)]
        for position in context.track(range(context.blocks.depth), f"{description}: forward"):
            streams.append(streams[-1].through(working_copy(context.block(position), context.device), position))
        self._behind: list[Tensor] = []
        # Found out on four tokens here; below, the pass would put a whole batch in their place.
        plain_head(context.model)
        for inputs, hidden in zip(self._inputs, streams.pop().hidden, strict=True):
            loss, count, gradient = _head_gradient(context, inputs, hidden)
            nats, self.tokens = nats + loss, self.tokens + count
            self._behind.append(gradient.to(context.device))
        self.loss = nats / max(1, self.tokens)
        self._streams = streams

    def back(
        self,
        position: int,
        paths: Collection[str] = (),
        use: Callable[[TextBatch, dict[str, Watched]], None] | None = None,
        block: nn.Module | None = None,
    ) -> None:
        """Go back through the block at ``position``, which must be the last one not yet passed.

        ``use`` is called for each batch with the linears at ``paths``. ``block`` runs instead of the full model's own.
        """
        assert position == len(self._streams) - 1, "blocks are passed from the last to the first"
        module = block if block is not None else working_copy(self.context.block(position), self.context.device)
        before = self._streams.pop()
        for index, (batch, hidden) in enumerate(zip(self.batches, before.hidden, strict=True)):
            gradient, watched = block_backward(module, hidden, batch.calls[position], self._behind[index], paths)
            self._behind[index] = gradient
            if use is not None:
                use(batch, watched)

    def gradients(self) -> list[Tensor]:
        """The loss's gradient [B, T, hidden] at the state in front of the blocks that are still to be passed."""
        return self._behind

    def states(self) -> list[Tensor]:
        """The hidden states in front of the next block to be passed."""
        return self._streams[-1].hidden


def block_backward(
    block: nn.Module, hidden: Tensor, call: BlockCall, behind: Tensor, paths: Collection[str] = ()
) -> tuple[Tensor, dict[str, Watched]]:
    """Run ``block`` forward and back; ``behind`` is the gradient at its output.

    Returns the gradient at its input and, for the linears at ``paths``, what they read and the gradient at what they
    wrote. No gradient of a parameter is computed.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen[path] = ((args[0] if args else next(iter(kwargs.values()))).detach(), output)

        return hook

    handles = [block.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    try:
        with torch.enable_grad(), frozen(block):
            start = hidden.detach().requires_grad_(True)
            state = call_block(block, start, call)
            wanted = [start, *(output for _, output in seen.values())]
            found = torch.autograd.grad(state, wanted, behind.to(state.dtype), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    watched = {path: Watched(x, g) for (path, (x, _)), g in zip(seen.items(), gradients[1:], strict=True)}
    return gradients[0], watched


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of ``module`` requires a gradient for the length of a ``with`` block."""
    switches = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, on in switches.items():
            parameter.requires_grad_(on)


def _head_gradient(context: Context, batch: Batch, hidden: Tensor) -> tuple[float, int, Tensor]:
    """Summed loss, number of predicted tokens, and the loss's gradient at ``hidden``, the state behind all blocks."""
    stack = block_list(context.model, context.blocks)
    device = next(context.model.parameters()).device
    leaf = hidden.detach().to(device).requires_grad_(True)

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    moved = {name: value.to(device) for name, value in batch.items()}
    with torch.enable_grad(), frozen(context.model), passing_through(stack):
        handle = stack[-1].register_forward_hook(leave)
        try:
            nats, tokens = objective_of(context.model).nll(context.model, moved)
            (gradient,) = torch.autograd.grad(nats, leaf)
        finally:
            handle.remove()
    return float(nats.detach()), tokens, gradient
