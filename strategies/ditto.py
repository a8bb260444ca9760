"""Ditto: beside the shared adapter, each site tunes one for itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from offsite_fl import local
from offsite_fl.config import check
from offsite_fl.local.algorithm import LocalAlgorithm

from .local_strategy import LocalStrategy


class Ditto(LocalStrategy):
    """Ditto: FedAvg, and beside it a personal adapter at each site, pulled towards the shared one (arXiv 2012.04221).

    The shared adapter and the plug-in are those of FedAvg to the last bit. A site's own adapter never leaves it; its
    validation loss is reported as ``personal_loss`` beside the usual ``loss``. See :class:`offsite_fl.local.Ditto`.

    lam
        The paper's lambda: how strongly a personal adapter v is pulled towards the shared w, ``lam / 2 * |v - w|^2``.
    """

    def __init__(self, lam: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        check(lam >= 0, f"ditto's lam can't be negative, got {lam}")
        self.lam = lam

    def part(self, reference: Iterable[str]) -> LocalAlgorithm:
        """See :class:`LocalStrategy`."""
        return local.Ditto(self.lam)
