"""The linears of a block that write to the residual stream, factors included, and the re-fit of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.affine_fit import AffineFit
from offsite_fl.emulators.groups import dense_linears, plan_block, run_tapped
from offsite_fl.emulators.streams import Stream
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight


@dataclass(frozen=True)
class WriterFit:
    """``ridge`` and ``rank`` as in :class:`~offsite_fl.emulators.affine_fit.AffineFit`, and how much of the change is
    made: with ``share = 1`` all of it.
    """

    ridge: float
    rank: int | None = None
    share: float = 1.0


def stream_writers(block: nn.Module, stream: Stream, position: int) -> tuple[str, ...]:
    """Paths of the linears whose outputs, added to the block's input, are its output, in the order in which they run.

    A low-rank linear counts as one, and so does the second linear of a harmonizer. Empty if the block isn't such a
    sum: norms behind attention or MLP, scaled residuals. ``position`` is that of the call in ``stream``'s batches.
    """
    batch = stream.batches[0]
    return plan_block(block, stream.hidden[0], batch.calls[position], batch.rows, list(_linears(block))).writers


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(block, Harmonizer):
        yield "up", block.up
    factored = [(path, m) for path, m in block.named_modules() if isinstance(m, LowRankLinear)]
    yield from factored
    yield from dense_linears(block)


@torch.no_grad()
def states_behind(block: nn.Module, stream: Stream, position: int, writers: Sequence[str]) -> list[Tensor]:
    """By batch, the stream [B, T, hidden] behind the last of ``writers``, which are the block's first ones."""
    states = []
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        taps = run_tapped(block, hidden, batch.calls[position], outputs=writers, partial=True)
        states.append(_sum(hidden, taps.outputs.values()))
    return states


@torch.no_grad()
def refit_writer(
    block: nn.Module,
    stream: Stream,
    position: int,
    writers: Sequence[str],
    wanted: Sequence[Tensor],
    how: WriterFit,
) -> None:
    """Replace weight and bias of the last of ``writers`` in ``block`` so that the stream behind it is ``wanted``.

    Of a low-rank linear only the second factor (and the bias) changes. A linear without a bias gets one. Shapes and
    dtypes stay.

    Args:
        block: in eval mode; its modules are its own, its tensors may be shared.
        stream: in front of the block.
        position: of the call in the stream's batches.
        writers: the block's first writers, as :func:`stream_writers` gives them, up to the one in question.
        wanted: by batch, [B, T, hidden].
        how: the fit's options.
    """
    path = writers[-1]
    path = f"{path}.up" if isinstance(block.get_submodule(path), LowRankLinear) else path
    linear = block.get_submodule(path)
    outputs, inputs = linear_weight(linear).shape
    fit = AffineFit(inputs, outputs, linear_weight(linear).device)
    for batch, hidden, goal in zip(stream.batches, stream.hidden, wanted, strict=True):
        taps = run_tapped(block, hidden, batch.calls[position], inputs=[path], outputs=writers, partial=True)
        state = _sum(hidden, taps.outputs.values())
        fit.add(batch.rows(taps.inputs[path]), batch.rows(goal.float() - state.float()))
    change, shift = fit.change(how.ridge, how.rank, f"{path} in block {position}")
    _add(linear, how.share * change, how.share * shift)


def _add(linear: nn.Module, change: Tensor, shift: Tensor) -> None:
    """Give ``linear`` a weight and a bias of its own, with what is to be added to them."""
    weight, bias = linear_weight(linear).double(), linear_bias(linear)
    old = linear.weight
    assert isinstance(old, Tensor)
    linear.weight = nn.Parameter(torch.empty_like(old), requires_grad=False)
    linear_weight(linear).copy_(weight + change)
    shift = shift if bias is None else bias.double() + shift
    linear.bias = nn.Parameter(shift.to(old.dtype), requires_grad=False)


def _sum(hidden: Tensor, outputs: Iterable[Tensor]) -> Tensor:
    for output in outputs:
        hidden = hidden + output.reshape(hidden.shape)
    return hidden
