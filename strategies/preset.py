"""Strategies that stand for a published way of federated offsite-tuning, and hold the model owner's choices to it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.bundle import Bundle
from offsite_fl.config import TuneConfig
from offsite_fl.data.sources import Source
from offsite_fl.models.split import Split

from .local_strategy import forms
from .lora_strategy import settled
from .outgoing import Form
from .snapshot import nested_of

if TYPE_CHECKING:
    from offsite_fl.owner import ModelOwner


@dataclass(frozen=True)
class Setup:
    """What a run is made of, as far as a preset has a say in it, known before a model is cut.

    ``depth`` is the number of the full model's blocks, ``emulator`` the spec of what stands for the middle, and
    ``public`` whether there is text of nobody's private data.
    """

    split: Split
    depth: int
    emulator: str
    tune: TuneConfig
    public: bool

    @property
    def adapter(self) -> tuple[int, ...]:
        """The blocks that are tuned, by their place in the full model."""
        return self.split.resolve(self.depth)


class Preset(FedAvg):
    """FedAvg that :class:`OffsiteTuning` shows the model owner before anything else."""

    @abstractmethod
    def fits(self, setup: Setup) -> None:
        """``ConfigError`` if something isn't as the method wants it, and what would be right."""

    def meet(self, owner: ModelOwner, bundle: Bundle, tune: TuneConfig, public: Source | None) -> None:
        """Take up what the method needs of the owner's side; by default nothing. The setup fits already."""


def introduce(base: Strategy, owner: ModelOwner, bundle: Bundle, tune: TuneConfig, public: Source | None) -> None:
    """Let every preset in ``base``, alone or inside a wrapper, meet the model owner."""
    for preset in nested_of(base, Preset):
        preset.fits(Setup(owner.split, owner.blocks.depth, owner.emulator, tune, public is not None))
        preset.meet(owner, bundle, tune, public)


def check_fit(base: Strategy, setup: Setup) -> None:
    """``ConfigError`` if ``base`` can't run in ``setup``: what :class:`OffsiteTuning` would say once it has a bundle.

    No model is needed for it, so a grid of many runs is held against all its strategies before the first one begins.
    """
    tune = settled(setup.tune, base)
    slots = {f"adapter.{slot}.weight": torch.zeros(1) for slot in range(len(setup.adapter))}
    forms(base, Form("", "fp32", slots, tune))
    for preset in nested_of(base, Preset):
        preset.fits(replace(setup, tune=tune))
