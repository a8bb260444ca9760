"""Measuring one cell: an emulator against the full model on public examples, and what tuning on it is worth."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offsite_fl.choosing.arms import (
    Outcome,
    Values,
    at_rate,
    best_rate,
    emulator_with,
    on_public,
    scaled,
    tuned_adapter,
    untuned,
)
from offsite_fl.choosing.kinds import Score
from offsite_fl.choosing.parts import Parts, Private
from offsite_fl.choosing.peak import peak_memory
from offsite_fl.choosing.results import Built, Numbers, OnPublicText, ScaleTried, Tuned
from offsite_fl.choosing.settings import Settings
from offsite_fl.config import TuneConfig
from offsite_fl.data.loader import Batch
from offsite_fl.emulators import Context, Emulator, EmulatorMethod, start
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.report import emulated_network, flops_share, hidden_error
from offsite_fl.emulators.verbatim import verbatim_share
from offsite_fl.models.head import by_slot_names
from offsite_fl.owner import ModelOwner
from offsite_fl.repair import Repair
from offsite_fl.tuning.tune import TuneResult, tune


class Bench:
    """An owner, the examples, and the settings that are the same for all cells; the owner's model stays as it is."""

    def __init__(self, owner: ModelOwner, settings: Settings, parts: Parts, progress: bool = False) -> None:
        self.owner, self.settings, self.parts, self.progress = owner, settings, parts, progress
        self._public = parts.batches(parts.public)
        self._test = parts.batches(parts.private.test) if parts.private else ()
        self._on_full: dict[TuneConfig, Values] = {}

    def context(self, seed: int, workdir: Path | None = None) -> Context:
        """What a method may look at: the calibration part of the public examples only."""
        size, examples = self.settings.tune.block_size, self.parts.calibration
        return self.owner.context(examples, len(examples) * size, size, seed, workdir, self.progress)

    # The full model's own numbers, the same for all cells -------------------------------------------------------

    @functools.cached_property
    def zero_shot(self) -> Score:
        """The untuned full model on the test data."""
        return self._score(self.owner.model, self._test)

    @functools.cached_property
    def public_loss(self) -> float:
        """The full model's loss on held-out public examples."""
        return self._score(self.owner.model, self._public).loss

    @functools.cached_property
    def _gradients(self) -> dict[str, Tensor]:
        return full_gradients(self.context(seed=0), self._public)

    def _score(self, model: torch.nn.Module, batches: tuple[Batch, ...]) -> Score:
        return self.settings.kind.score(model, batches, self.progress)

    # One cell ---------------------------------------------------------------------------------------------------

    def candidate(self, method: EmulatorMethod, seed: int, workdir: Path) -> tuple[Built, OnPublicText, Tuned | None]:
        """Build an emulator, measure it on public examples and, where there are private data, tune on it."""
        context = self.context(seed, workdir)
        began = time.perf_counter()
        with peak_memory(context.device) as peak:
            emulator = method.compress(start(context), context)
        seconds = time.perf_counter() - began
        return (
            self._built(emulator, context, seconds, peak.bytes),
            self._on_public_text(emulator, context),
            self._tuned(emulator, context, seed, self.settings.repair),
        )

    def uncompressed(self, seed: int) -> tuple[Built, OnPublicText, Tuned | None]:
        """The same of the middle as it is: the most that this adapter can gain."""
        context = self.context(seed)
        middle = start(context)
        blocks = len(context.adapter)
        same = OnPublicText(self.public_loss, self.public_loss, 0.0, 1.0, 1.0, (1.0,) * blocks, (1.0,) * blocks)
        return self._built(middle, context, 0.0, None), same, self._tuned(middle, context, seed)

    def full_fine_tuning(self, seed: int) -> Tuned:
        """Every parameter tuned on copies of the full model: the upper bound."""
        private = self._private()
        scores: dict[float, Score] = {}

        def arm(rate: float) -> tuple[Values, TuneResult]:
            model = copy.deepcopy(self.owner.model)
            config = at_rate(self._tuning(lora=False), rate, seed)
            everything = by_slot_names(model, self.owner.head)
            done = tune(
                model, everything, private.train, config, validation=private.validation, pad_id=self.parts.pad_id
            )
            scores[rate] = self._score(model, self._test)
            return {}, done

        best = best_rate(self.settings.full_rates, arm)
        return self._told(best, plug_in=scores[best.rate])

    def _built(self, emulator: Emulator, context: Context, seconds: float, peak: int | None) -> Built:
        return Built(
            bytes=stored_bytes(block.module for block in emulator.blocks),
            middle_bytes=stored_bytes(context.block(index) for index in context.middle),
            verbatim_share=verbatim_share(emulator, context),
            flops_share=flops_share(emulator, context),
            seconds=round(seconds, 3),
            peak_bytes=peak,
            notes=emulator.notes,
        )

    def _on_public_text(self, emulator: Emulator, context: Context) -> OnPublicText:
        match = match_gradients(emulator_gradients(emulator, context, self._public), self._gradients)
        return OnPublicText(
            full_loss=self.public_loss,
            emulator_loss=self._score(emulated_network(emulator, context), self._public).loss,
            hidden_error=hidden_error(emulator, context, self._public),
            cosine=match.cosine,
            norm_ratio=match.norm_ratio,
            cosine_by_block=match.cosine_by_block,
            norm_ratio_by_block=match.norm_ratio_by_block,
        )

    def _tuned(self, emulator: Emulator, context: Context, seed: int, repair: bool = False) -> Tuned | None:
        if self.parts.private is None:
            return None
        private, pad_id, config = self.parts.private, self.parts.pad_id, self._tuning()
        best = best_rate(
            self.settings.rates,
            lambda rate: tuned_adapter(
                emulator, context, private.train, at_rate(config, rate, seed), pad_id, private.validation
            ),
        )
        return self._told(
            best,
            emulator_zero_shot=self._score(emulated_network(emulator, context), self._test),
            emulator_tuned=self._score(emulator_with(best.values, emulator, context), self._test),
            plug_in=self._plugged_in(best.values, self._test),
            without_repair=self._without_repair(emulator, context, best, seed) if repair else None,
            scales=self._scales(best, context),
        )

    def _told(self, best: Outcome, *, scales: tuple[ScaleTried, ...] = (), **scores: Score | None) -> Tuned:
        """What tuning gave, by the names of the networks that there are."""
        every = {"zero_shot": self.zero_shot, "emulator_zero_shot": None, "emulator_tuned": None} | scores

        def numbers(of: Callable[[Score], float | None]) -> dict[str, Any]:
            return {name: None if score is None else of(score) for name, score in every.items()}

        classes = self.zero_shot.accuracy is not None
        return Tuned(
            rate=best.rate,
            rates=best.rates,
            **numbers(lambda score: score.loss),
            scales=scales,
            seconds=round(best.seconds, 3),
            accuracy=Numbers(**numbers(lambda score: score.accuracy)) if classes else None,
        )

    def _plugged_in(self, values: Values, batches: tuple[Batch, ...]) -> Score:
        with self.owner.plugged_in(values) as model:
            return self._score(model, batches)

    def _without_repair(self, emulator: Emulator, context: Context, best: Outcome, seed: int) -> Score:
        """The plug-in less what :meth:`~offsite_fl.owner.ModelOwner.measure_repair` finds on calibration examples."""
        config = on_public(at_rate(self._tuning(), best.rate, seed), self._private().train)
        if config not in self._on_full:
            # Of this seed only: seeds come one after the other, and an adapter may be large.
            self._on_full = {known: values for known, values in self._on_full.items() if known.seed == seed}
            self._on_full[config] = self._on_public(start(context), context, config)
        ours, theirs = self._on_public(emulator, context, config), self._on_full[config]
        repair = Repair({name: ours[name] - theirs[name] for name in ours}, "", config.max_steps or 0)
        return self._plugged_in(repair.taken_out(best.values, untuned(context)), self._test)

    def _on_public(self, emulator: Emulator, context: Context, config: TuneConfig) -> Values:
        return tuned_adapter(emulator, context, self.parts.calibration, config, self.parts.pad_id)[0]

    def _scales(self, best: Outcome, context: Context) -> tuple[ScaleTried, ...]:
        if self.settings.scales == (1.0,):
            return ()
        tried = []
        for scale in self.settings.scales:
            values = scaled(best.values, context, scale)
            losses = (self._plugged_in(values, batches).loss for batches in (self._public, self._test))
            tried.append(ScaleTried(scale, *losses))
        return tuple(tried)

    def _private(self) -> Private:
        assert self.parts.private is not None  # the loop asks for full fine-tuning only where there are data
        return self.parts.private

    def _tuning(self, lora: bool = True) -> TuneConfig:
        config = replace(self.settings.tune, progress=self.progress)
        return config if lora else config.without_lora()
