"""What a middle hands back to the blocks in front of it: the gradient at its input, given the one at its output.

Adapter blocks in front of the middle learn from this alone. With ``h`` the state that enters the middle, ``M`` the full
middle, ``E`` the emulator and ``v = dL/dM(h)`` the gradient of the full model's next-token loss behind it, the full
model hands back ``J_M' v`` and the emulator ``J_E' v``, where J is the derivative at ``h``. The loss is

    L_grad = ||J_E' v - J_M' v||^2 / ||J_M' v||^2

over real tokens. It is ours and no paper's. The gradients of the adapter blocks behind the middle depend on the
emulator through its output, which L_KD compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from offsite_fl.emulators.backward import frozen
from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.student import Middle, hooked, state_of, with_hidden
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import evaluating, plain_head
from offsite_fl.evaluation.objective import objective_of


@dataclass(frozen=True)
class Handed:
    """The full model's gradients on one batch, each [B, T, hidden], of the summed loss in nats.

    ``arriving`` is v, the gradient behind the middle; ``leaving`` is ``J_M' v``, the one in front of it.
    """

    arriving: Tensor
    leaving: Tensor


class FullMiddle(Middle):
    """The full model, run forward and back on the state that enters its middle; nothing of it is copied or changed."""

    def forward(self, batch: Batch, hidden: Tensor) -> Handed:
        """The gradients on ``batch`` if ``hidden`` [B, T, hidden] enters the middle; on the device of ``hidden``."""
        # Found out on four tokens here; below, the hook would put a whole batch in their place.
        plain_head(self.model)
        seen: dict[str, Tensor] = {}
        given = hidden.detach().to(self.device, self.dtype).requires_grad_()

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return with_hidden(args, kwargs, given)

        def leaving(_: nn.Module, args: Any, output: Any) -> None:
            seen["t"] = state_of(output)

        hooks = hooked(self.entry, entering, self.exit, leaving)
        with hooks, torch.enable_grad(), frozen(self.model), evaluating(self.model):
            moved = {name: value.to(self.device) for name, value in batch.items()}
            nats, _ = objective_of(self.model).nll(self.model, moved)
            arriving, handed = torch.autograd.grad(nats, (seen["t"], given))
        return Handed(arriving.to(hidden.device), handed.to(hidden.device))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention that is computed in a ``with`` block can be differentiated twice, which the fused kernels can't."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def handed_back(entering: Tensor, state: Tensor, arriving: Tensor) -> Tensor:
    """``J' v`` for the network that made ``state`` of ``entering``, with gradient.

    Args:
        entering: [B, T, hidden], requires a gradient.
        state: [B, T, hidden], computed from it within :func:`twice_differentiable`.
        arriving: v, the gradient at ``state``.

    Returns:
        The gradient at ``entering``, of its shape and dtype; it can be differentiated by what ``state`` depends on.

    >>> x, w = torch.tensor([[[1.0, 2.0]]], requires_grad=True), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> handed_back(x, x @ w.T, torch.tensor([[[1.0, 1.0]]]))
    tensor([[[4., 6.]]])
    """
    (gradient,) = torch.autograd.grad(state, entering, arriving.to(state.dtype), create_graph=True)
    return gradient


def handed_back_error(full: Handed, entering: Tensor, state: Tensor, mask: Tensor) -> Tensor:
    """L_grad of one batch, a scalar with gradient, in fp32 or, of wider states, in their own precision.

    ``mask`` [B, T] says which tokens are real; 0 where the full model hands back nothing and neither does the emulator.
    """
    kept = mask.bool()
    wide = torch.promote_types(state.dtype, torch.float32)
    goal, got = full.leaving[kept].to(wide), handed_back(entering, state, full.arriving)[kept].to(wide)
    return (goal - got).square().sum() / goal.square().sum().clamp_min(torch.finfo(wide).tiny)


def refuse_without_front(context: Context) -> None:
    """``EmulatorError`` if no adapter block lies in front of a middle block: nothing reads what is handed back."""
    if min(context.adapter) > context.middle[-1]:
        raise EmulatorError(
            "distill w-grad matches what the emulator hands back to adapter blocks in front of it, and this split has "
            "none there: set w-grad=0, or a split whose adapter has first blocks"
        )
