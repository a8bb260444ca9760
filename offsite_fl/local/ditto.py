"""Ditto at a site: beside its part in the shared adapter it tunes a personal one."""

from __future__ import annotations

from dataclasses import dataclass

from offsite_fl.config import check
from offsite_fl.local.algorithm import Job, LocalAlgorithm, Outcome, as_metrics, register

PERSONAL_LOSS = "personal_loss"


@register("ditto")
@dataclass(frozen=True)
class Ditto(LocalAlgorithm):
    """Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization" (arXiv 2012.04221).

    The shared adapter w is tuned as under plain averaging, and its update is all that travels. Beside it the site
    tunes its own v, from where it left it (at first from the received w), on

        F_i(v) + lam / 2 |v - w|^2     with w as it was received in this round,

    for as many steps. Under LoRA the distance is that of the products of the factors, as if they were merged.
    ``lam = 0`` is local tuning without any federation, a large one keeps v at w. Costs a second tuning a round.
    """

    lam: float

    def __post_init__(self) -> None:
        check(self.lam >= 0, f"ditto's lam can't be negative, got {self.lam}")

    def tune(self, job: Job) -> Outcome:
        """Tune w for everybody, v for the site."""
        shared = job.tuned(job.received)
        own = job.tuned(job.kept or job.received, proximal_mu=self.lam, towards=job.received)
        told = {
            f"personal-{name}": own.metrics[name] for name in ("train-loss", "validation-loss") if name in own.metrics
        }
        return Outcome(shared.tensors, shared.num_examples, {**shared.metrics, **told}, own.tensors)

    def evaluate(self, job: Job) -> dict[str, float]:
        """The loss of the received adapter, and that of the site's own beside it."""
        own = job.loss(job.kept or job.received)
        return {**as_metrics(job, job.received), **({} if own is None else {PERSONAL_LOSS: own})}
