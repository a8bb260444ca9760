"""Measuring one cell: an emulator against the full model on public text, and what tuning on it is worth."""

from __future__ import annotations

import copy
import functools
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from offsite_fl.choosing.arms import (
    Outcome,
    Values,
    at_rate,
    best_rate,
    emulator_with,
    scaled,
    tuned_adapter,
)
from offsite_fl.choosing.peak import peak_memory
from offsite_fl.choosing.results import Built, OnPublicText, ScaleTried, Tuned
from offsite_fl.choosing.settings import Settings
from offsite_fl.choosing.texts import Private, Texts
from offsite_fl.config import TuneConfig
from offsite_fl.data.loader import Batch
from offsite_fl.emulators import Context, Emulator, EmulatorMethod, start
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.report import emulated_network, flops_share, hidden_error, verbatim_share
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.owner import ModelOwner
from offsite_fl.tuning.tune import TuneResult, tune


class Bench:
    """An owner, the texts, and the settings that are the same for all cells; the owner's model stays as it is."""

    def __init__(self, owner: ModelOwner, settings: Settings, texts: Texts, progress: bool = False) -> None:
        self.owner, self.settings, self.texts, self.progress = owner, settings, texts, progress
        self._public = texts.batches(texts.public)
        self._test = texts.batches(texts.private.test) if texts.private else ()

    def context(self, seed: int, workdir: Path | None = None) -> Context:
        """What a method may look at: the calibration part of the public text only."""
        size = self.settings.tune.block_size
        return self.owner.context(
            self.texts.calibration, self.settings.calibration_tokens, size, seed, workdir, self.progress
        )

    # The full model's own numbers, the same for all cells -------------------------------------------------------

    @functools.cached_property
    def zero_shot(self) -> float:
        """The full model's loss on the test data."""
        return self._loss_on(self.owner.model, self._test)

    @functools.cached_property
    def public_loss(self) -> float:
        """The full model's loss on held-out public text."""
        return self._loss_on(self.owner.model, self._public)

    @functools.cached_property
    def _gradients(self) -> dict[str, Tensor]:
        return full_gradients(self.context(seed=0), self._public)

    def _loss_on(self, model: torch.nn.Module, batches: tuple[Batch, ...]) -> float:
        return evaluate_loss(model, batches, progress=self.progress).loss

    # One cell ---------------------------------------------------------------------------------------------------

    def candidate(self, method: EmulatorMethod, seed: int, workdir: Path) -> tuple[Built, OnPublicText, Tuned | None]:
        """Build an emulator, measure it on public text and, where there are private data, tune on it."""
        context = self.context(seed, workdir)
        began = time.perf_counter()
        with peak_memory(context.device) as peak:
            emulator = method.compress(start(context), context)
        seconds = time.perf_counter() - began
        return (
            self._built(emulator, context, seconds, peak.bytes),
            self._on_public_text(emulator, context),
            self._tuned(emulator, context, seed),
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
        losses: dict[float, float] = {}

        def arm(rate: float) -> tuple[Values, TuneResult]:
            model = copy.deepcopy(self.owner.model)
            config = at_rate(self._tuning(lora=False), rate, seed)
            everything = dict(model.named_parameters())
            done = tune(
                model, everything, private.train, config, validation=private.validation, pad_id=self.texts.pad_id
            )
            losses[rate] = self._loss_on(model, self._test)
            return {}, done

        best = best_rate(self.settings.full_rates, arm)
        return Tuned(best.rate, best.rates, self.zero_shot, None, None, losses[best.rate], (), best.seconds)

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
            emulator_loss=self._loss_on(emulated_network(emulator, context), self._public),
            hidden_error=hidden_error(emulator, context, self._public),
            cosine=match.cosine,
            norm_ratio=match.norm_ratio,
            cosine_by_block=match.cosine_by_block,
            norm_ratio_by_block=match.norm_ratio_by_block,
        )

    def _tuned(self, emulator: Emulator, context: Context, seed: int) -> Tuned | None:
        if self.texts.private is None:
            return None
        private, pad_id, config = self.texts.private, self.texts.pad_id, self._tuning()
        best = best_rate(
            self.settings.rates,
            lambda rate: tuned_adapter(emulator, context, private, at_rate(config, rate, seed), pad_id),
        )
        return Tuned(
            rate=best.rate,
            rates=best.rates,
            zero_shot=self.zero_shot,
            emulator_zero_shot=self._loss_on(emulated_network(emulator, context), self._test),
            emulator_tuned=self._loss_on(emulator_with(best.values, emulator, context), self._test),
            plug_in=self._plugged_in(best.values, self._test),
            scales=self._scales(best, context),
            seconds=round(best.seconds, 3),
        )

    def _plugged_in(self, values: Values, batches: tuple[Batch, ...]) -> float:
        with self.owner.plugged_in(values) as model:
            return self._loss_on(model, batches)

    def _scales(self, best: Outcome, context: Context) -> tuple[ScaleTried, ...]:
        if self.settings.scales == (1.0,):
            return ()
        tried = []
        for scale in self.settings.scales:
            values = scaled(best.values, context, scale)
            losses = (self._plugged_in(values, batches) for batches in (self._public, self._test))
            tried.append(ScaleTried(scale, *losses))
        return tuple(tried)

    def _private(self) -> Private:
        assert self.texts.private is not None  # the loop asks for full fine-tuning only where there are data
        return self.texts.private

    def _tuning(self, lora: bool = True) -> TuneConfig:
        config = replace(self.settings.tune, progress=self.progress)
        return config if lora else config.without_lora()
