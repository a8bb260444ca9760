"""Measuring the rows of a result on held-out data: what one party alone can't see, side by side.

A :class:`Measure` belongs to whoever holds the full model *and* a test set: the model owner with public text, or an
experiment that plays all parties. The emulator network is opened once and given each adapter in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from datasets import Dataset, concatenate_datasets  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.config import LoraOptions, LossOn, TuneConfig
from offsite_fl.data.fingerprints import leak
from offsite_fl.data.loader import Batch, make_loader
from offsite_fl.data.sources import Source
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import DataError, UpdateError
from offsite_fl.evaluation.classification import evaluate_classes
from offsite_fl.evaluation.loss import LossResult, evaluate_loss
from offsite_fl.evaluation.rows import Row
from offsite_fl.models.head import by_slot_names
from offsite_fl.models.tasks import CLASSIFICATION
from offsite_fl.owner import ModelOwner
from offsite_fl.patch import Patch
from offsite_fl.repair import Repair
from offsite_fl.tuning.dtypes import resolve_device
from offsite_fl.tuning.tune import tune

Tensors = Mapping[str, torch.Tensor]
Score = Callable[[torch.nn.Module], Row]


class Measure:
    """The five rows of one owner and bundle on one test set.

    Args:
        owner: holds the full model and the bundle that it handed out.
        test: held-out data, a file or ``datasets.Dataset``; None where ``score`` brings its own.
        block_size: tokens of an example.
        batch_size: examples of a batch; no influence on the numbers beyond rounding.
        max_tokens: use only the first so many tokens (None: all); a classifier is measured on every example.
        loss_on: "all" tokens or the "answer" only, as in tuning.
        device: where both networks are measured, in fp32; None lets accelerate's order decide (CUDA, MPS, CPU). The
            owner's model is moved there.
        score: what gives the row of a network, in place of what the owner's task is measured by.
    """

    def __init__(
        self,
        owner: ModelOwner,
        test: Source | None,
        *,
        block_size: int = 128,
        batch_size: int = 8,
        max_tokens: int | None = None,
        loss_on: LossOn = "all",
        progress: bool = False,
        device: str | None = None,
        score: Score | None = None,
    ) -> None:
        if owner.bundle is None:
            raise UpdateError("the owner has no bundle to measure: call make_bundle() or use_bundle() first")
        self.owner, self.progress = owner, progress
        self.block_size, self.loss_on = block_size, loss_on
        if test is None and score is None:
            raise DataError("there is nothing to measure on: give held-out data, or a score that has its own")
        self._test = None if test is None else self._read(test, max_tokens)
        self.batches: list[Batch] = []
        if self._test is not None:
            self.batches = list(make_loader(self._test, batch_size, pad_id=owner.pad_id))
        self.device = resolve_device(TuneConfig(device=device))
        self._score = score or (self._class_row if owner.task in CLASSIFICATION else self._loss_row)
        # fp32 like the full model, so that the rows differ by what they are about and not by their dtype.
        self._data_owner = DataOwner.open(owner.bundle, "float32")
        self._patch: Patch | None = None
        owner.model.to(self.device)

    def _read(self, test: Source, max_tokens: int | None) -> Dataset:
        examples = self.owner.examples(test, self.block_size, self.loss_on)
        if max_tokens is not None and self.owner.task not in CLASSIFICATION:
            examples = examples.select(range(min(len(examples), max(1, max_tokens // self.block_size))))
        return examples

    def leak(self, sources: Sequence[Source]) -> str | None:
        """A sentence for the report where test examples are also among those of ``sources``, which tune; else None.

        Only equal examples are noticed (:func:`~offsite_fl.data.fingerprints.leak`).
        """
        tuned_on = self.pooled(sources)
        return None if self._test is None else leak([tuned_on], self._test)

    @property
    def tokens(self) -> int:
        """How many tokens of held-out data the numbers rest on; 0 for images."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches if "attention_mask" in batch)

    @property
    def examples(self) -> int:
        """How many examples of held-out data the numbers rest on."""
        return sum(len(batch["labels"]) for batch in self.batches)

    def _row(self, model: torch.nn.Module) -> Row:
        return self._score(model.to(self.device))

    def _loss_row(self, model: torch.nn.Module) -> Row:
        result: LossResult = evaluate_loss(model, self.batches, self.device, progress=self.progress)
        return Row(loss=result.loss)

    def _class_row(self, model: torch.nn.Module) -> Row:
        return evaluate_classes(model, self.batches, self.device, progress=self.progress).row

    def use_patch(self, patch: Patch | None) -> None:
        """From now on measure tuned adapters in the emulator with this patch on it, which the data owners have."""
        self._patch = patch

    def full_zero_shot(self) -> Row:
        """The full model as it is."""
        return self._row(self.owner.model)

    def emulator_zero_shot(self) -> Row:
        """The emulator with the adapter as handed out, both of them."""
        self._data_owner.patch(None)
        self._data_owner.reset()
        return self._row(self._data_owner.model)

    def emulator_tuned(self, tensors: Tensors, lora: LoraOptions | None = None) -> Row:
        """The emulator with a tuned adapter: what the data owners have in their hands."""
        self._data_owner.patch(self._patch)
        self._data_owner.load_adapter(self.owner.adapter_values(tensors, lora))
        return self._row(self._data_owner.model)

    def plug_in(self, tensors: Tensors, lora: LoraOptions | None = None, repair: Repair | None = None) -> Row:
        """The full model with a tuned adapter, less a ``repair``; the owner's model is as before afterwards."""
        with self.owner.plugged_in(tensors, lora, repair) as model:
            return self._row(model)

    def full_fine_tuning(self, sources: Sequence[Source], config: TuneConfig) -> Row:
        """A copy of the full model with every parameter tuned on all owners' data pooled: the upper bound."""
        model = copy.deepcopy(self.owner.model)
        train = self.pooled(sources)
        tune(
            model,
            # Under the head's own slot names, so that its learning rate is that of the data owners.
            by_slot_names(model, self.owner.head),
            train,
            config.without_lora(),
            pad_id=self.owner.pad_id,
        )
        return self._row(model)

    def pooled(self, sources: Sequence[Source]) -> Dataset:
        """The examples of several owners in one set, each owner's own text packed apart."""
        if not sources:
            raise DataError("full fine-tuning needs the data of at least one owner")
        return concatenate_datasets([self.owner.examples(source, self.block_size, self.loss_on) for source in sources])
