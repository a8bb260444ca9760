"""One site's part in a message of a local algorithm: what it works with, and the state that it takes up and leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ConfigError, WireError
from offsite_fl.local.algorithm import LocalAlgorithm, Outcome, Tensors
from offsite_fl.local.site_state import SiteState
from offsite_fl.update import Update
from offsite_fl.wire import names
from offsite_fl.wire.codecs import decode, encode
from offsite_fl.wire.records import text
from offsite_fl.wire.settings import server_round


@dataclass(frozen=True)
class Turn:
    """A :class:`~offsite_fl.local.algorithm.Job` on a real data owner, made by :meth:`of`."""

    algorithm: LocalAlgorithm
    owner: DataOwner
    settings: TuneConfig
    run: TuneConfig
    received: Tensors
    codec: str
    reference: Tensors
    kept: Tensors | None
    train: Dataset
    validation: Dataset | None
    states: SiteState
    round: int
    went_on_from: int

    @classmethod
    def of(
        cls,
        algorithm: LocalAlgorithm,
        config: Mapping[str, Any],
        *,
        owner: DataOwner,
        settings: TuneConfig,
        run: TuneConfig,
        received: Tensors,
        codec: str,
        reference: Tensors,
        data: tuple[Dataset, Dataset | None],
        cache: Path,
        site: str,
    ) -> Turn:
        """Check the settings and open what ``site`` kept; ``cache`` is the cache's folder, ``config`` the message's.

        ``reference``: what ``codec`` measures differences from.
        ``ConfigError`` if the algorithm can't work with the settings, ``StateError`` if the site's state is lost.
        """
        for tune in (run, settings):
            algorithm.check(tune)
        if settings.lora != run.lora:
            raise ConfigError(f"tune.lora-rank can't be set for one site under {algorithm.name}")
        states = SiteState(cache, text(config.get(names.RUN_KEY), names.RUN_KEY), site, algorithm.name)
        last = config.get(names.STATE_ROUND)
        if isinstance(last, bool) or not isinstance(last, int) or last < 0:
            raise WireError(f"{names.STATE_ROUND} must be a whole number from 0, got {ascii(last)[:40]}")
        initial = _initial(owner, run)
        kept = states.load(last, {name: initial[name] for name in algorithm.keeps(initial)})
        return cls(
            algorithm, owner, settings, run, received, codec, reference, kept, *data, states, server_round(config), last
        )

    def take(self) -> Outcome:
        """Do what a train message asks for, and keep what is to be kept."""
        outcome = self.algorithm.tune(self)
        self.states.save(self.round, outcome.keep, self.went_on_from)
        going = self.algorithm.travels(outcome.tensors)
        # In the order of the message: Flower's privacy mods compare the lists of keys.
        return replace(outcome, tensors={name: going[name] for name in self.received if name in going})

    # What the algorithm works with: see Job -------------------------------------------------------------------

    def tuned(
        self,
        start: Tensors,
        *,
        proximal_mu: float | None = None,
        towards: Tensors | None = None,
        correction: Tensors | None = None,
    ) -> Update:
        """See :class:`~offsite_fl.local.algorithm.Job`."""
        tune = self.settings if proximal_mu is None else replace(self.settings, proximal_mu=proximal_mu)
        return self.owner.tune(
            self.train, tune, validation=self.validation, start=start, towards=towards, correction=correction
        )

    def as_read(self, values: Tensors) -> dict[str, torch.Tensor]:
        """See :class:`~offsite_fl.local.algorithm.Job`."""
        like = {name: self.reference[name] for name in values}
        return decode(*encode(values, like, self.codec), like, self.codec)

    def loss(self, values: Tensors) -> float | None:
        """See :class:`~offsite_fl.local.algorithm.Job`."""
        return (
            None if self.validation is None else loss_of(self.owner, values, self.validation, self.settings, self.run)
        )

    def initial(self) -> dict[str, torch.Tensor]:
        """See :class:`~offsite_fl.local.algorithm.Job`."""
        return _initial(self.owner, self.run)


def loss_of(owner: DataOwner, values: Tensors, validation: Dataset, tune: TuneConfig, run: TuneConfig) -> float:
    """Loss of the emulator with ``values``, the state of a run with the settings ``run``, in nats per token."""
    lora = run.kept_lora
    if lora is None:
        owner.load_adapter(values)
        return float(owner.evaluate(validation, tune).loss)
    inside = owner.lora(lora, tune.seed, values)
    try:
        return float(owner.evaluate(validation, tune).loss)
    finally:
        inside.remove()


def _initial(owner: DataOwner, run: TuneConfig) -> dict[str, torch.Tensor]:
    if run.kept_lora is None:
        owner.reset()
        return owner.adapter()
    inside = owner.lora(run.kept_lora, run.seed)
    try:
        return inside.tensors()
    finally:
        inside.remove()
