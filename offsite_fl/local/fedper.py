"""Personal blocks at a site: some adapter blocks never leave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from offsite_fl.config import check
from offsite_fl.local.algorithm import Job, LocalAlgorithm, Outcome, Tensors, as_metrics, register


@register("fedper")
@dataclass(frozen=True)
class FedPer(LocalAlgorithm):
    """Arivazhagan et al. 2019, "Federated Learning with Personalization Layers" (arXiv 1912.00818).

    Adapter blocks in the slots ``personal`` stay at the site: it tunes them together with the shared ones and goes on
    with its own in its next round. They travel neither down nor up. A site's first round begins with the values of the
    bundle (under LoRA: with the factors that the run begins with). Evaluation is that of the site's own model.
    """

    personal: tuple[int, ...]

    rewrites = True

    def __post_init__(self) -> None:
        check(bool(self.personal), "fedper needs at least one personal slot")

    def is_personal(self, name: str) -> bool:
        """Whether a tensor of this name belongs to a block that stays at the site."""
        return any(name.startswith(f"adapter.{slot}.") for slot in self.personal)

    def travels(self, reference: Tensors) -> dict[str, torch.Tensor]:
        """The tensors of the shared blocks."""
        return {name: value for name, value in reference.items() if not self.is_personal(name)}

    def keeps(self, names_of_run: Iterable[str]) -> list[str]:
        """The tensors of the personal blocks."""
        return [name for name in names_of_run if self.is_personal(name)]

    def _whole(self, job: Job) -> dict[str, torch.Tensor]:
        """The site's own adapter: the received shared blocks, and its personal ones."""
        own = job.kept
        return {n: job.received[n] if n in job.received else (own or {}).get(n, t) for n, t in job.initial().items()}

    def tune(self, job: Job) -> Outcome:
        """Tune all blocks, hand back the shared ones."""
        update = job.tuned(self._whole(job))
        keep = {name: update.tensors[name] for name in self.keeps(update.tensors)}
        shared = {name: update.tensors[name] for name in job.received}
        return Outcome(shared, update.num_examples, update.metrics, keep)

    def evaluate(self, job: Job) -> dict[str, float]:
        """The loss of the site's own adapter."""
        return as_metrics(job, self._whole(job))
