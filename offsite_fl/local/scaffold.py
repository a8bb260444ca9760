"""SCAFFOLD at a site: every step is corrected by what the site's gradients differ in from everybody's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError, OffsiteError
from offsite_fl.local.algorithm import Job, LocalAlgorithm, Outcome, Tensors, register
from offsite_fl.wire import names
from offsite_fl.wire.beside import control_of, controls


@register("scaffold")
@dataclass(frozen=True)
class Scaffold(LocalAlgorithm):
    """Karimireddy et al. 2020, "SCAFFOLD" (arXiv 1910.06378), Algorithm 1 with option II.

    With the server's control variate c and the site's own c_i (zero at first), each step is

        y <- y - lr (g(y) - c_i + c),     and afterwards     c_i+ = c_i - c + (x - y) / (K lr).

    ``K lr`` is the sum of the steps' learning rates here, which is the same under a constant one and keeps
    c_i+ = mean of the site's own gradients under any schedule. That mean is what the option needs, so it holds for SGD
    without a proximal term only: AdamW's steps aren't proportional to gradients. Gradients are clipped before they are
    corrected. Where validation data chooses an earlier step, y and the sum are those of that step.

    Down travel x and c, up y and ``K lr``. The change c_i+ - c_i = (x - y) / (K lr) - c holds nothing that the server
    doesn't know, so it works it out for itself by the same lines, and a site can't claim another one. Both take y as
    the codec rounds it, so that they agree. c_i stays at the site.
    """

    evaluates = False
    rewrites = True

    def beside(self, reference: Tensors) -> dict[str, torch.Tensor]:
        """A control variate for each tensor."""
        return controls(reference)

    def check(self, tune: TuneConfig) -> None:
        """SGD, and no proximal term."""
        super().check(tune)
        if tune.optimizer != "sgd":
            raise ConfigError(
                f"scaffold needs tune.optimizer = 'sgd', got {tune.optimizer!r}: its control variates are mean "
                "gradients, which steps of an adaptive optimiser don't tell"
            )
        if tune.head_lr_scale != 1:
            raise ConfigError(
                f"scaffold reads mean gradients off one learning rate, but head-lr-scale = {tune.head_lr_scale:g} "
                "gives the head another one: leave it out"
            )
        if tune.proximal_mu > 0:
            raise ConfigError("scaffold holds sites together itself: leave out proximal-mu")

    def tune(self, job: Job) -> Outcome:
        """Corrected tuning, then the new control variate; ``OffsiteError`` if no step counts."""
        control = control_of(job.received)
        start = {name: job.received[name] for name in control}
        own = job.kept or {name: torch.zeros_like(value) for name, value in control.items()}
        update = job.tuned(start, correction={name: control[name] - own[name] for name in control})
        rates = update.metrics["lr-sum"]
        if not rates > 0:
            raise OffsiteError(
                f"the learning rates of the steps that count sum to {rates:g}, so scaffold can't read a mean gradient "
                "off them: a step that overflows in fp16 doesn't count, and a warmup begins at 0; set precision = 'no' "
                "or take more steps"
            )
        changes = control_of(self.derived(job.received, job.as_read(update.tensors), {"lr_sum": rates}))
        return Outcome(
            update.tensors, update.num_examples, update.metrics, {n: own[n] + change for n, change in changes.items()}
        )

    def derived(self, sent: Tensors, values: Tensors, metrics: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """``c_i+ - c_i = (x - y) / lr_sum - c`` of each tensor, in fp64 and rounded to fp32."""
        rates = metrics["lr_sum"]
        return {
            names.CONTROL + n: ((sent[n].double() - values[n].double()) / rates - c.double()).float()
            for n, c in control_of(sent).items()
        }
