"""Training under a smoothness penalty, measured as the emulator will be handed out: after the cut to low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.distill import Distill, DistillRun
from offsite_fl.emulators.factor import project
from offsite_fl.emulators.penalties import Penalty, frobenius, nuclear_subgradient
from offsite_fl.emulators.rank_rules import Place, places
from offsite_fl.emulators.training import hold_out, with_values
from offsite_fl.models.linears import linear_weight

# Steps between two decompositions of a matrix for its nuclear norm.
REFRESH = 10
# Share of the steps over which the penalty's weight rises.
RAMP = 0.3

Ranks = Callable[[Mapping[Place, Tensor]], dict[Place, int]]
"""The ranks at which matrices [out, in] are cut; those that stay dense aren't listed."""


@dataclass(frozen=True)
class SmoothTraining(Distill):
    """Options of one training: a distillation's, the penalty's weight ``lam``, and the ``spec`` of the method."""

    lam: float = 0.0
    spec: str = ""

    name: ClassVar[str] = "smooth"

    def lam_at(self, step: int) -> float:
        """The penalty's weight at the step with index ``step``: from 0 to ``lam`` over the first 30 % of the steps.

        >>> [SmoothTraining(steps=10, lam=3.0).lam_at(step) for step in (0, 1, 2, 3, 9)]
        [0.0, 1.0, 2.0, 3.0, 3.0]
        """
        return self.lam * min(1.0, step / (RAMP * self.steps))


def train_smooth(
    emulator: Emulator,
    context: Context,
    options: SmoothTraining,
    penalties: Mapping[Place, Sequence[Penalty]],
    ranks: Ranks,
) -> Emulator:
    """Train copies of ``emulator``'s blocks under ``penalties`` and return the best, still dense.

    The best is that of least L_KD on the validation text once its matrices are cut to ``ranks``.
    """
    train, validation = hold_out(context.need_calibration("smooth mode=train"), context, options.name)
    return with_values(emulator, SmoothRun(options, emulator, context, train, validation, penalties, ranks).run())


@dataclass
class SmoothRun(DistillRun):
    """One training; ``options`` are a :class:`SmoothTraining`. The penalty adds to the loss, the cut to the measure."""

    penalties: Mapping[Place, Sequence[Penalty]]
    ranks: Ranks
    _directions: dict[Place, Tensor] = field(init=False, default_factory=dict)

    def weights(self) -> dict[Place, Tensor]:
        """The weight [out, in] of every dense linear, live."""
        found = {}
        for (slot, path), linear in places(self.emulator).items():
            weight = self.student.parameters[f"emulator.{slot}.{path}.weight"]
            stored_as_it_is = linear_weight(linear) is linear.weight
            found[slot, path] = weight if stored_as_it_is else weight.T
        return found

    def penalty(self) -> Tensor:
        """``sum R(W)`` over all penalties of all matrices, each normalised; a scalar with gradient."""
        weights = self.weights()
        # Anew behind each checkpoint, so that a run that goes on there doesn't depend on weights that are gone.
        anew = self.step % REFRESH == 0 or self.step % self.options.eval_every == 0
        total = torch.zeros((), device=self.student.device)
        for place, penalty in ((place, p) for place, added in self.penalties.items() for p in added):
            weight = weights[place]
            if penalty.kind != "nuc":
                total = total + penalty.normalised(weight)
                continue
            if anew or place not in self._directions:
                self._directions[place] = nuclear_subgradient(weight.detach())
            total = total + (self._directions[place] * weight).sum() / frobenius(weight)
        return total

    def _loss(self, batch: Batch) -> Tensor:
        assert isinstance(self.options, SmoothTraining)
        loss, lam = super()._loss(batch), self.options.lam_at(self.step)
        return loss + lam * self.penalty() if lam else loss

    @torch.no_grad()
    def _measure(self) -> float:
        """L_KD on the validation batches with the matrices cut."""
        with self._truncated():
            return super()._measure()

    @contextmanager
    def _truncated(self) -> Iterator[None]:
        """The truncated weights in place of the parameters for the length of a ``with`` block."""
        weights = self.weights()
        ranks = self.ranks(weights)
        exact = {place: weights[place].detach().clone() for place in ranks}
        try:
            for place, rank in ranks.items():
                up, down = project(exact[place].double(), None, rank)
                weights[place].copy_(up @ down)
            yield
        finally:
            for place, weight in exact.items():
                weights[place].copy_(weight)
