"""The data owner: opens a bundle, tunes its adapter on private data, hands back an update and nothing else.

Offsite-Tuning (arXiv 2302.04870): the data owner holds the adapter A and a lossy emulator E* of the frozen middle,
tunes A to A' on the network [A, E*] and returns A'. The full model is never here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import nn
from transformers import PreTrainedTokenizerBase

from offsite_fl.bundle import Bundle, open_bundle
from offsite_fl.config import FrozenDtype, LoraOptions, LossOn, TuneConfig
from offsite_fl.data.by_task import classes_of, examples_for, pad_id_for
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import make_loader
from offsite_fl.data.sources import Source
from offsite_fl.errors import UpdateError
from offsite_fl.evaluation.loss import LossResult, evaluate_loss
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.models.head import head_parameters
from offsite_fl.models.network import NetworkPlan, adapter_parameters, build_network, fill_network, place_blocks
from offsite_fl.models.processors import Processor, need_tokenizer
from offsite_fl.patch import Patch, digest_of
from offsite_fl.tuning.dtypes import prepare_dtypes, resolve_device
from offsite_fl.tuning.emulator_lora import EmulatorLora, emulator_factors
from offsite_fl.tuning.lora import AdapterLora, add_lora, added, check_factors, target_weights
from offsite_fl.tuning.tune import TuneResult, tune
from offsite_fl.update import Update


class DataOwner:
    """One party with data: a bundle, the network made from it, and the adapter's current values.

    >>> data_owner = DataOwner.open("bundle/")  # doctest: +SKIP
    >>> update = data_owner.tune("notes.jsonl", TuneConfig(epochs=1))  # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle, frozen_dtype: FrozenDtype = "auto", device: str | None = None) -> None:
        self.bundle = bundle
        self.model = network_of(bundle, frozen_dtype, device)
        self._received = {name: p.detach().clone() for name, p in self._parameters().items()}
        self._patched: EmulatorLora | None = None

    @classmethod
    def open(
        cls, bundle: str | Path | Bundle, frozen_dtype: FrozenDtype = "auto", device: str | None = None
    ) -> DataOwner:
        """Verify a bundle folder and build its network; ``BundleError`` says what is wrong with a bad one.

        ``frozen_dtype``: of the tensors that aren't trained; "auto" is bf16 where ``device`` (None: the best one that
        is found) is a CUDA device, else fp32. The network is moved there when it is tuned or evaluated.
        """
        return cls(bundle if isinstance(bundle, Bundle) else open_bundle(bundle), frozen_dtype, device)

    @property
    def plan(self) -> NetworkPlan:
        """The network as plain data."""
        return self.bundle.plan

    @functools.cached_property
    def processor(self) -> Processor:
        """The tokenizer or image processor that came with the bundle."""
        return self.bundle.processor()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the bundle; ``ModelError`` if that is one for images."""
        return need_tokenizer(self.processor)

    @property
    def classes(self) -> Classes | None:
        """The classes of a classifier; None for all other models."""
        return classes_of(self.plan.task, self.model.config)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.model, self.plan)

    def adapter(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter's current values by slot name, fp32 on the CPU."""
        return {name: p.detach().float().cpu().clone() for name, p in self._parameters().items()}

    def reset(self) -> None:
        """Put the adapter back to the values that came in the bundle."""
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(self._received[name])

    def load_adapter(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take adapter values by slot name, all or none; ``UpdateError`` names a tensor that doesn't fit."""
        parameters = self._parameters()
        if tensors.keys() != parameters.keys():
            odd = sorted(tensors.keys() ^ parameters.keys())
            raise UpdateError(f"adapter values don't match the bundle's adapter: {odd[:3]} are missing or unknown")
        for name, value in tensors.items():
            if value.shape != parameters[name].shape or not bool(torch.isfinite(value).all()):
                raise UpdateError(
                    f"adapter value {name!r} has shape {tuple(value.shape)} or values that aren't finite; "
                    f"the bundle's has shape {tuple(parameters[name].shape)}"
                )
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(value)

    def patch(self, patch: Patch | None) -> None:
        """Put a patch's factors on the emulator, in place of those of an earlier one; None leaves the bare emulator.

        They are frozen. ``UpdateError`` if the patch is for another bundle or doesn't fit; then none is on it.
        """
        if self._patched is not None:
            self._patched.remove()
            self._patched = None
        if patch is None:
            return
        if patch.bundle != self.bundle.digest:
            raise UpdateError(f"the patch is for bundle {patch.bundle[:12]}, this one is {self.bundle.digest[:12]}")
        # Before any factor is made: the rank is what the patch says of itself.
        check_factors(emulator_factors(self.model, self.plan, patch.options), patch.tensors)
        self._patched = EmulatorLora(self.model, self.plan, patch.options)
        self._patched.load(patch.tensors)

    @property
    def patch_digest(self) -> str | None:
        """The digest of the factors as they are in the network now; None where the emulator is bare."""
        if self._patched is None:
            return None
        return digest_of(self._patched.tensors(), self.bundle.digest, self._patched.options)

    def lora(
        self, options: LoraOptions, seed: int = 0, factors: Mapping[str, torch.Tensor] | None = None
    ) -> AdapterLora:
        """LoRA factors inside the adapter (:mod:`peft`), fresh from ``seed`` or with the given values.

        The adapter goes back to the values that came in the bundle, for these are what the owner merges factors into.
        The result's ``remove()`` takes the factors out again; adapter values themselves stay frozen meanwhile.
        """
        self.reset()
        inside = lora_inside(self.model, self.plan, options, seed)
        try:
            if factors is not None:
                inside.load(factors)
        except UpdateError:
            inside.remove()  # or nobody could, and the network would stay as it is for whoever works with it next
            raise
        return inside

    def tune(
        self,
        source: Source,
        config: TuneConfig | None = None,
        *,
        validation: Source | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        merge: bool = True,
        towards: Mapping[str, torch.Tensor] | None = None,
        correction: Mapping[str, torch.Tensor] | None = None,
    ) -> Update:
        """Tune the adapter (or LoRA factors inside it) on private data and return the update.

        Args:
            source: a file (.jsonl, .json, .csv, .parquet, .txt) or a ``datasets.Dataset``; for a model for images also
                a folder. What must be in it is said at :func:`offsite_fl.data.by_task.examples_for`.
            config: how; ``config.lora_rank`` above 0 tunes LoRA factors only and returns those.
            validation: data to watch for early stopping; else ``config.validation_share`` of ``source`` is set aside.
            start: values to begin with, as an earlier :class:`Update` carries them; None begins with the adapter as it
                is now (under LoRA: with fresh factors on the adapter that came in the bundle). The proximal term, if
                any, pulls towards these. With ``config.lora_fresh`` these are values of the full adapter, on top of
                which fresh factors are tuned.
            merge: what ``config.lora_fresh`` hands back: True the full adapter with the factors merged, False the
                factors alone, for whoever knows ``start`` and merges them.
            towards: values under the names of the result that the proximal term pulls towards instead of ``start``.
            correction: added to every step's gradient, see :func:`offsite_fl.tuning.tune.tune`.
        """
        config = config or TuneConfig()
        train = self._examples(source, config)
        held_out = self._examples(validation, config) if validation is not None else None
        if config.kept_lora is not None:
            self.reset()
        elif start is not None:
            self.load_adapter(start)
            start = None
        before = self.adapter() if config.lora_fresh and merge else {}
        more = {"start": start, "towards": towards, "correction": correction}
        done = tune_adapter(self.model, self.plan, train, config, validation=held_out, pad_id=self.pad_id, **more)
        tensors, lora = done.tensors, config.lora
        if before and lora is not None:
            targets = target_weights(adapter_blocks(self.model, self.plan), lora)
            tensors, lora = added(before, tensors, targets, lora.alpha / lora.rank), None
        return Update(tensors, self.bundle.digest, done.examples, lora, done.metrics)

    def _examples(self, source: Source, config: TuneConfig) -> Dataset:
        return self.examples(source, config.block_size, config.loss_on)

    def examples(self, source: Source, block_size: int, loss_on: LossOn = "all", *, labelled: bool = True) -> Dataset:
        """What ``source`` holds for this model; see :func:`offsite_fl.data.by_task.examples_for`."""
        return examples_for(
            self.plan.task,
            source,
            self.processor,
            self.classes,
            block_size=block_size,
            loss_on=loss_on,
            labelled=labelled,
        )

    @property
    def pad_id(self) -> int:
        """Token id that fills short rows of a batch (they carry no loss)."""
        return pad_id_for(self.plan.task, self.processor, self.model.config)

    def evaluate(self, source: Source, config: TuneConfig | None = None) -> LossResult:
        """Loss of the emulator with the adapter as it is now; ``config`` says how to cut ``source`` into batches."""
        config = config or TuneConfig()
        batches = make_loader(self._examples(source, config), config.batch_size, pad_id=self.pad_id)
        device = resolve_device(config)
        return evaluate_loss(self.model.to(device), batches, device, nll=objective_of(self.model).nll)


def adapter_blocks(network: nn.Module, plan: NetworkPlan) -> dict[int, nn.Module]:
    """The adapter's blocks in ``network`` by slot."""
    blocks = place_blocks(network, plan)
    return {slot: blocks[index] for slot, index in plan.adapter_places().items()}


def lora_inside(network: nn.Module, plan: NetworkPlan, options: LoraOptions, seed: int = 0) -> AdapterLora:
    """LoRA factors in the adapter's blocks of ``network``, and its head beside them."""
    return add_lora(adapter_blocks(network, plan), options, seed, head_parameters(network, plan.head))


def tune_adapter(
    network: nn.Module,
    plan: NetworkPlan,
    train: Dataset,
    config: TuneConfig,
    *,
    validation: Dataset | None = None,
    pad_id: int = 0,
    start: Mapping[str, torch.Tensor] | None = None,
    towards: Mapping[str, torch.Tensor] | None = None,
    correction: Mapping[str, torch.Tensor] | None = None,
) -> TuneResult:
    """Tune the adapter of ``network``, or LoRA factors inside it where ``config`` asks for them.

    ``start`` are LoRA factors to begin with (None: fresh ones); the factors are taken out again at the end. The result
    has both factors of every linear, also where ``config.lora_train`` leaves one of them as it was. ``towards`` and
    ``correction``: see :meth:`DataOwner.tune`.
    """

    def tuned(trained: Mapping[str, nn.Parameter], beside: Mapping[str, nn.Parameter] | None = None) -> TuneResult:
        more = {"received": towards, "correction": correction}
        return tune(network, trained, train, config, validation=validation, pad_id=pad_id, beside=beside, **more)

    if config.lora is None:
        return tuned(adapter_parameters(network, plan))
    inside = lora_inside(network, plan, config.lora, config.seed)
    try:
        if start is not None:
            inside.load(start)
        trained, every = inside.parameters(config.lora_train), inside.parameters()
        beside = {name: every[name] for name in every if name not in trained}
        return replace(tuned(trained, beside), tensors=inside.tensors())
    finally:
        inside.remove()


def network_of(bundle: Bundle, frozen_dtype: FrozenDtype = "auto", device: str | None = None) -> nn.Module:
    """The network of a bundle: frozen tensors straight from the files, adapter fp32 and private.

    Where ``frozen_dtype`` isn't that of the files, frozen tensors are cast; packed weights and their scales never are.
    """
    network = build_network(bundle.plan)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in bundle.tensors().items():
        # Adapter values are cloned: training writes to them, while the files are mapped into every client.
        tensors[name] = tensor.to(torch.float32, copy=True) if name.startswith("adapter.") else tensor
    fill_network(network, bundle.plan, tensors)
    prepare_dtypes(
        network, adapter_parameters(network, bundle.plan), TuneConfig(frozen_dtype=frozen_dtype, device=device)
    )
    return network
