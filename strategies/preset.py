"""Strategies that stand for a published way of federated offsite-tuning, and hold the model owner's choices to it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.bundle import Bundle
from offsite_fl.config import TuneConfig
from offsite_fl.data.sources import Source

from .snapshot import nested

if TYPE_CHECKING:
    from offsite_fl.owner import ModelOwner


class Preset(FedAvg):
    """FedAvg that :class:`OffsiteTuning` shows the model owner before anything else."""

    @abstractmethod
    def meet(self, owner: ModelOwner, bundle: Bundle, tune: TuneConfig, public: Source | None) -> None:
        """Take up what the method needs of the owner's side; ``ConfigError`` if something isn't as it wants it."""


def introduce(base: Strategy, owner: ModelOwner, bundle: Bundle, tune: TuneConfig, public: Source | None) -> None:
    """Let every preset in ``base``, alone or inside a wrapper, meet the model owner."""
    for strategy in nested(base):
        if isinstance(strategy, Preset):
            strategy.meet(owner, bundle, tune, public)
