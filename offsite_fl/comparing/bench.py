"""The full model on the server's side: hands out bundles, measures adapters on the whole test text and by domain."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from offsite_fl.bundle import Bundle, fingerprint
from offsite_fl.comparing.cells import Cell
from offsite_fl.comparing.partitions import OWNER
from offsite_fl.comparing.places import WHOLE, Inputs, Places
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.config import LoraOptions
from offsite_fl.data.examples import to_examples
from offsite_fl.data.loader import make_loader, pad_id_of
from offsite_fl.data.sources import load_source
from offsite_fl.emulators import Context, Emulator, EmulatorMethod
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.measure import Measure
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.load import load_model
from offsite_fl.models.processors import need_tokenizer
from offsite_fl.models.tasks import need_next_token
from offsite_fl.owner import ModelOwner

BATCH = 8


@dataclass(frozen=True)
class Whole(EmulatorMethod):
    """The middle as it is, for references."""

    name = WHOLE

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Nothing is compressed."""
        return emulator


class Bench:
    """One full model, the bundles made from it, and the test text."""

    def __init__(self, settings: GridSettings, out: Path) -> None:
        self.settings = settings
        self.model, processor = load_model(settings.model.source(), task=None)
        need_next_token(self.model)  # cells are compared by that loss
        self.tokenizer = need_tokenizer(processor)
        depth = find_blocks(self.model).depth
        inputs = Inputs.of(settings, fingerprint(self.model.state_dict()), depth)
        self.places = Places(settings, inputs, out)
        self._measures: dict[Path, Measure] = {}

    def owner(self, cell: Cell) -> ModelOwner:
        """A model owner of the cell's split; all of them share the one model in memory."""
        return ModelOwner(self.model, self.tokenizer, self.places.split(cell))

    def make_bundle(self, cell: Cell) -> Bundle:
        """The cell's bundle, made if it isn't there."""
        folder, owner = self.places.bundle(cell), self.owner(cell)
        if folder.is_dir():
            return owner.use_bundle(folder)
        emulator, part = self.places.emulator(cell), self.settings.model
        return owner.make_bundle(
            Whole() if emulator == WHOLE else emulator,
            folder,
            calibration=self.settings.data.file(self.settings.data.public),
            calibration_tokens=part.calibration_tokens,
            block_size=self.settings.tune.block_size,
            dtype=getattr(torch, part.bundle_dtype) if part.bundle_dtype else None,
            workdir=self.places.out / "work" / folder.name,
        )

    def measure(self, cell: Cell) -> Measure:
        """What measures the cell's adapters. One is kept: each holds the network of a bundle."""
        folder = self.places.bundle(cell)
        if folder not in self._measures:
            self._measures.clear()
            owner = self.owner(cell)
            owner.use_bundle(folder)
            tune, test = self.settings.tune, self.settings.test
            self._measures[folder] = Measure(
                owner,
                self.settings.data.file(self.settings.data.test),
                block_size=tune.block_size,
                batch_size=BATCH,
                max_tokens=test.tokens,
                loss_on=tune.loss_on,
                device=tune.device,
            )
        return self._measures[folder]

    @functools.cached_property
    def domains(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        """Batches of the test text by domain, together about as many tokens as the whole; empty if it names none."""
        rows = load_source(self.settings.data.file(self.settings.data.test))
        if OWNER not in rows.column_names:
            return {}
        tune, found = self.settings.tune, {}
        share = max(1, self.settings.test.tokens // len(self.settings.data.owners) // tune.block_size)
        for owner in self.settings.data.owners:
            own = [number for number, name in enumerate(rows[OWNER]) if name == owner]
            if not own:
                return {}
            kept = to_examples(rows.select(own), self.tokenizer, block_size=tune.block_size, loss_on=tune.loss_on)
            kept = kept.select(range(min(len(kept), share)))
            found[owner] = list(make_loader(kept, BATCH, pad_id=pad_id_of(self.tokenizer)))
        return found

    def by_domain(
        self, owner: ModelOwner, tensors: Mapping[str, torch.Tensor] | None, lora: LoraOptions | None = None
    ) -> dict[str, float]:
        """Loss of the plug-in (of the untuned model where ``tensors`` is None) on each domain of the test text."""
        plugged: AbstractContextManager[nn.Module]
        plugged = nullcontext(owner.model) if tensors is None else owner.plugged_in(tensors, lora)
        with plugged as model:
            return self.losses(model)

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Loss of a network on each domain of the test text."""
        return {owner: evaluate_loss(model, batches).loss for owner, batches in self.domains.items()}
