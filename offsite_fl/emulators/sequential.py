"""Low-rank factors fitted on calibration text, front to back, one block in work at a time.

Plain and activation-weighted SVD compress each matrix as if its input were still the full model's. In a chain of
compressed blocks it isn't, so errors pile up, and the adapter then spends its steps on repairing them.
:func:`fit_sequentially` gives each matrix the inputs it will really have and asks it for what the full model does:

* a matrix that *writes* to the residual stream (attention output, MLP output) is asked for the full model's stream
  minus the compressed one, so that it puts right what went wrong before it;
* every other matrix is asked for the full model's own output of that matrix. So is a writer where the block isn't a
  plain sum of its input and its writers (post-norms as in Gemma 2, scaled residuals).

Where blocks were dropped before, the last writer of a block aims at the stream in front of the next block that still
runs, and so makes up for the dropped ones. In memory: the hidden states of both models, and for the block in work
those behind it, its writers' outputs and the inputs of its other groups; no activation of the MLP's width unless the
second rule's exception needs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Context, Emulator
from offsite_fl.emulators.factor import Refit, cut_linear, gram, rank_for
from offsite_fl.emulators.groups import BlockPlan, Taps, dense_linears, kind_of, plan_block, run_tapped
from offsite_fl.emulators.input_moments import input_moments
from offsite_fl.emulators.streams import Stream, read_batches, running_order, sent_home, working_copy
from offsite_fl.models.linears import is_named, linear_bias, linear_weight


@dataclass(frozen=True)
class LowRankFit:
    """How much of each matrix stays (``keep``), how strongly the re-fit is tied to the original (``ridge``), and which.

    ``targets`` match as in peft: a linear's whole path in the block or its end (``o_proj``); none mean every linear.
    """

    keep: float
    ridge: float
    targets: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Whether the linear at ``path`` is to be cut."""
        return not self.targets or any(is_named(path, target) for target in self.targets)

    def shrinks(self, block: nn.Module, path: str) -> bool:
        """Whether the linear at ``path`` is to be cut, and factors would make it smaller."""
        return self.takes(path) and rank_for(self.keep, *linear_weight(block.get_submodule(path)).shape) is not None


def fit_on_full_inputs(emulator: Emulator, context: Context, fit: LowRankFit) -> dict[int, nn.Module]:
    """Activation-weighted SVD: every matrix truncated for the inputs it has in the full model.

    Returns the new module of each block of ``emulator`` by its index. A block that runs at several places is fitted at
    the first.
    """
    batches = context.need_calibration("low-rank mode=activation")
    fitted: dict[int, nn.Module] = {}
    for slot, moments in input_moments(emulator, context, batches, "low-rank activation", fit.takes):
        block = emulator.blocks[slot]
        cut = working_copy(block.module, context.device)
        for path in [path for path, _ in dense_linears(cut) if fit.takes(path)]:
            refit = Refit(moments[path], fit.ridge, f"{path} in block {block.origin}") if path in moments else None
            cut_linear(cut, path, fit.keep, refit)
        fitted[slot] = sent_home(cut, context)
    return fitted


def fit_sequentially(emulator: Emulator, context: Context, fit: LowRankFit) -> dict[int, nn.Module]:
    """The sequential correction; returns the new module of each block of ``emulator`` by its index.

    A block that runs at several places is fitted at the first of them.
    """
    full = Stream.entering(read_batches(context, context.need_calibration("low-rank mode=sequential")))
    cut, fitted, plans = full, dict[int, nn.Module](), _Plans()
    order = running_order(context.adapter, emulator.positions, context.blocks.depth)
    full = _onward(full, context, 0, order[0][0])
    for position, behind in context.track(order, "low-rank sequential", total=len(order)):
        slot = emulator.layout.get(position)
        if slot is None or slot in fitted:
            together = slot is None and cut is full
            full = _onward(full, context, position, position + 1)
            block = context.block(position) if slot is None else fitted[slot]
            cut = full if together else cut.through(working_copy(block, context.device), position)
            full = _onward(full, context, position + 1, behind)
            continue
        module = working_copy(emulator.blocks[slot].module, context.device)
        work = _BlockWork(module, plans.of(module, cut, position), context, position, full, cut)
        full = work.goal = _onward(work.goal, context, position + 1, behind)
        cut = work.fit(fit)
        fitted[slot] = sent_home(work.cut, context)
    return fitted


def _onward(stream: Stream, context: Context, start: int, stop: int) -> Stream:
    """The full model's ``stream`` from in front of block ``start`` to in front of block ``stop``."""
    for position in range(start, stop):
        stream = stream.through(working_copy(context.block(position), context.device), position)
    return stream


class _BlockWork:
    """One block while its matrices are fitted in the order in which they run.

    ``before`` and ``cut_before`` are the full and the compressed model's streams in front of it, ``goal`` what the
    compressed stream behind it should be, ``seen`` what the full model's block did on each batch.
    """

    def __init__(
        self, cut: nn.Module, plan: BlockPlan, context: Context, position: int, before: Stream, cut_before: Stream
    ) -> None:
        self.cut, self.plan, self.position, self.before, self.cut_before = cut, plan, position, before, cut_before
        full = working_copy(context.block(position), context.device)
        self.reference = _references(full, cut)
        heads = [group[0] for group in self.plan.groups if self._compared(group)]
        writers = self.plan.writers
        self.seen = [
            run_tapped(full, hidden, batch.calls[position], inputs=heads, outputs=writers)
            for batch, hidden in zip(before.batches, before.hidden, strict=True)
        ]
        self.goal = Stream(before.batches, [_taken_state(taps) for taps in self.seen])
        self._unfinished: list[tuple[Tensor, Tensor]] = []

    def _compared(self, group: Sequence[str]) -> bool:
        """Whether a matrix of this group is asked for the full model's own output of it."""
        return any(path not in self.plan.writers and path in self.reference for path in group)

    @torch.no_grad()
    def fit(self, fit: LowRankFit) -> Stream:
        """Replace every linear that gets smaller and return the compressed stream behind the block.

        Inputs of a group are those behind all groups before it.
        """
        for group in self.plan.groups:
            shrinking = [path for path in group if fit.shrinks(self.cut, path)]
            if shrinking:
                self._fit_group(group, shrinking, fit)
        for path in filter(fit.takes, self.plan.others):
            cut_linear(self.cut, path, fit.keep)
        return self._behind()

    def _behind(self) -> Stream:
        if not self._unfinished:
            return self.cut_before.through(self.cut, self.position)
        last = self.cut.get_submodule(self.plan.writers[-1])
        return Stream(self.before.batches, [so_far + last(x).reshape(so_far.shape) for so_far, x in self._unfinished])

    def _finishes(self, group: Sequence[str]) -> bool:
        """Whether nothing but the last writer is left of the block, so that its input is all the rest depends on."""
        return group == self.plan.groups[-1] and tuple(group) == self.plan.writers[-1:] and not self.plan.others

    def _fit_group(self, group: Sequence[str], shrinking: Sequence[str], fit: LowRankFit) -> None:
        head, writer = group[0], next((path for path in group if path in self.plan.writers), None)
        moments = _no_moments(self.cut.get_submodule(head))
        drift, total = torch.zeros_like(moments), torch.zeros_like(moments[0])
        wrong = None if writer is None else torch.zeros_like(linear_weight(self.cut.get_submodule(writer)).double())
        compared, finishes = self._compared(group), self._finishes(group)
        for index, batch in enumerate(self.before.batches):
            taps = self._cut_taps(index, head, writer)
            given = batch.rows(taps.inputs[head])
            x = given.float()
            moments += gram(x)
            if compared:
                drift += ((batch.rows(self.seen[index].inputs[head]).float() - x).T @ x).double()
                total += x.sum(0).double()
            if writer is not None and wrong is not None:
                missing = batch.rows(self._missing(index, writer, taps)).float()
                missing -= self.cut.get_submodule(writer)(given).float()
                wrong += (missing.T @ x).double()
            if finishes:
                self._unfinished.append((self._so_far(index, taps), taps.inputs[head]))
        refit = Refit(moments, fit.ridge, f"{head} in block {self.position}")
        for path in shrinking:
            residual = wrong if path == writer else self._residual(path, moments, drift, total)
            cut_linear(self.cut, path, fit.keep, refit, residual)

    def _cut_taps(self, index: int, head: str, writer: str | None) -> Taps:
        """The compressed block, with what has been replaced so far, up to the group in work."""
        call = self.cut_before.batches[index].calls[self.position]
        earlier = () if writer is None else self._earlier(writer)
        return run_tapped(self.cut, self.cut_before.hidden[index], call, inputs=[head], outputs=earlier, partial=True)

    def _earlier(self, writer: str) -> tuple[str, ...]:
        return self.plan.writers[: self.plan.writers.index(writer)]

    def _missing(self, index: int, writer: str, taps: Taps) -> Tensor:
        """What ``writer`` must add to the compressed stream, [B, T, hidden]."""
        goal = self.goal.hidden[index]
        if writer != self.plan.writers[-1]:
            goal = self.before.hidden[index]
            for path in (*self._earlier(writer), writer):
                goal = goal + self.seen[index].outputs[path].reshape(goal.shape)
        return goal - self._so_far(index, taps)

    def _so_far(self, index: int, taps: Taps) -> Tensor:
        """The compressed stream with what the writers seen in ``taps`` have added to it."""
        state = self.cut_before.hidden[index]
        for output in taps.outputs.values():
            state = state + output.reshape(state.shape)
        return state

    def _residual(self, path: str, moments: Tensor, drift: Tensor, total: Tensor) -> Tensor | None:
        """``(Y - X W')' X`` for Y the full model's own output of this matrix, from moments alone.

        With X_f the full model's inputs and W_f its weight, Y - X W' = (X_f - X) W_f' + X (W_f - W)', and biases.
        """
        if path not in self.reference:
            return None
        reference, linear = self.reference[path], self.cut.get_submodule(path)
        theirs, ours = linear_weight(reference).double(), linear_weight(linear).double()
        residual = theirs @ drift
        if reference.weight is not linear.weight:
            residual += (theirs - ours) @ moments
        bias, own_bias = linear_bias(reference), linear_bias(linear)
        if bias is not None and own_bias is not None and bias is not own_bias:
            residual += torch.outer((bias - own_bias).double(), total)
        return residual


class _Plans:
    """Plans of blocks; those of one class with linears of the same shapes are alike, so one of them is looked at."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], BlockPlan] = {}

    def of(self, block: nn.Module, stream: Stream, position: int) -> BlockPlan:
        kind = kind_of(block)
        if kind not in self._known:
            batch = stream.batches[0]
            self._known[kind] = plan_block(block, stream.hidden[0], batch.calls[position], batch.rows)
        return self._known[kind]


def _references(full: nn.Module, cut: nn.Module) -> dict[str, nn.Module]:
    """The full block's dense linears of the same shape as those of the block in work, by path."""
    ours = {path: linear_weight(linear).shape for path, linear in dense_linears(cut)}
    return {path: m for path, m in dense_linears(full) if linear_weight(m).shape == ours.get(path)}


def _no_moments(linear: nn.Module) -> Tensor:
    weight = linear_weight(linear)
    return torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)


def _taken_state(taps: Taps) -> Tensor:
    assert taps.state is not None
    state, taps.state = taps.state, None
    return state
