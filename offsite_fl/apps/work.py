"""What a federation did, so that full fine-tuning can be given as much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from offsite_fl.config import TuneConfig
from offsite_fl.evaluation.rounds import RoundRecord


@dataclass(frozen=True)
class Work:
    """Who took part, optimiser steps one after the other, and examples in each of them."""

    owners: tuple[str, ...]
    steps: int
    examples: int

    @classmethod
    def of(
        cls,
        history: Iterable[RoundRecord],
        owners: tuple[str, ...],
        examples: Callable[[Mapping[str, float]], float],
    ) -> Work:
        """From what the data owners reported. They tune side by side, so a round has the steps of its busiest one.

        ``owners`` are all that there are, in their order; ``examples`` tells how many examples a reply's metrics
        stand for.
        """
        rounds = [entry.clients for entry in history if entry.clients]
        steps = sum(int(max(metrics.get("steps", 0) for metrics in clients.values())) for clients in rounds)
        gone_through = sum(examples(metrics) for clients in rounds for metrics in clients.values())
        seen = {name for clients in rounds for name in clients}
        known = tuple(owner for owner in owners if owner in seen)
        return cls(known or owners, max(1, steps), max(1, round(gone_through / max(1, steps))))

    def pooled(self, tune: TuneConfig, lr: float) -> TuneConfig:
        """How one party tunes on everybody's data as much as that: the upper bound's settings.

        A round of n owners with s steps of b examples each has s sequential steps over n * b examples; so does this.
        """
        return replace(
            tune,
            max_steps=self.steps,
            lr=lr,
            gradient_accumulation=max(1, round(self.examples / tune.batch_size)),
            schedule_steps=self.steps,
            schedule_offset=0,
            proximal_mu=0.0,
            validation_share=0.0,
            patience=None,
            progress=True,
        )


def sums_by_client(history: Iterable[RoundRecord], metric: str) -> dict[str, int]:
    """A reported number of each data owner, summed over all rounds."""
    sums: dict[str, float] = {}
    for entry in history:
        for name, metrics in entry.clients.items():
            sums[name] = sums.get(name, 0) + metrics.get(metric, 0)
    return {name: int(total) for name, total in sums.items()}
