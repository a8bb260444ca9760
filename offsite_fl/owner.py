"""The model owner: keeps the full model, hands out a bundle, plugs updates in.

Offsite-Tuning (arXiv 2302.04870). The full model is M = [A, E]: a few trainable blocks A, the *adapter*, and the frozen
rest E, the *middle*. The owner compresses the middle to an emulator E* and gives away (A, E*). Data owners tune A to A'
on [A, E*], and the owner plugs A' into the full model: M' = [A', E]. The owner never sees data, they never see E.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from torch import nn
from transformers import PreTrainedTokenizerBase

from offsite_fl.bundle import SHARD_BYTES, Bundle, OwnerMap, fingerprint, open_bundle, write_bundle
from offsite_fl.config import LoraOptions, LossOn, TuneConfig
from offsite_fl.data.by_task import classes_of, examples_for, has_labels, pad_id_for
from offsite_fl.data.examples import split_examples
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import make_loader
from offsite_fl.data.sources import Source
from offsite_fl.data_owner import DataOwner, network_of, tune_adapter
from offsite_fl.emulators import Batch, Context, Emulator, EmulatorMethod, parse_emulator, start
from offsite_fl.emulators.report import EmulatorReport, emulator_report, private_network
from offsite_fl.errors import BundleError, ModelError, SplitError, UpdateError
from offsite_fl.heads import nearest_class_mean_head
from offsite_fl.models.blocks import Blocks, block_list, find_blocks
from offsite_fl.models.head import HEAD, Head, choose_head, head_parameters, is_head
from offsite_fl.models.load import load_model
from offsite_fl.models.network import (
    NetworkPlan,
    expected_tensors,
    known_task,
    plan_network,
    shared_tensors,
)
from offsite_fl.models.padding import need_padding
from offsite_fl.models.plug import adapter_tensors, plug_in, swapped_in
from offsite_fl.models.processors import Processor, check_processor, need_tokenizer, on_pil
from offsite_fl.models.split import Split
from offsite_fl.models.tasks import CLASSIFICATION
from offsite_fl.repair import Repair
from offsite_fl.tuning.dtypes import resolve_device
from offsite_fl.tuning.lora import add_lora, merge_lora, target_weights
from offsite_fl.update import Update


class ModelOwner:
    """One party with a model: the full model, where it is cut, and the bundle that was handed out.

    >>> owner = ModelOwner.from_pretrained("path/or/hub-id", split=Split(first=2, last=2))  # doctest: +SKIP
    >>> bundle = owner.make_bundle("layer-drop:keep=8", out="bundle/")  # doctest: +SKIP
    >>> owner.plug_in(update)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        split: Split | None = None,
        *,
        task: str | None = None,
        head: Head = "auto",
    ) -> None:
        """Check that ``model`` can be cut at ``split`` and rebuilt by a data owner; ``task`` None goes by its class.

        ``processor`` is the model's tokenizer, or its image processor. ``head``: what is trained outside the blocks; by
        default a classifier's own, and nothing for all other models (:func:`~offsite_fl.models.head.choose_head`).
        """
        if hasattr(model, "peft_config"):
            raise ModelError(
                "the model is wrapped by PEFT, and its factors can't leave as blocks: merge them first, by "
                "model.merge_and_unload()"
            )
        self.model, self.processor, self.task = model.eval(), on_pil(processor), known_task(model, task)
        self.split = split or Split()
        self.blocks: Blocks = find_blocks(model)
        self.head = choose_head(model, self.blocks.path, self.task, head)
        if self.task in CLASSIFICATION:
            check_processor(processor, self.task)
        if self.task == "sequence-classification":
            need_padding(self.model)
        self.adapter_indices: tuple[int, ...] = self.split.resolve(self.blocks.depth)
        self.report: EmulatorReport | None = None
        self.emulator = ""
        self.bundle: Bundle | None = None
        self._plan(start(self.context()))  # a model that no client could rebuild is refused before any work is done
        self._handed_out = self.adapter()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        split: Split | None = None,
        *,
        task: str | None = None,
        head: Head = "auto",
        device: str | None = None,
    ) -> ModelOwner:
        """Load a full model from a folder, a hub id, or ``"smollm2"`` (the one that a Python package ships).

        ``task`` is a key of :data:`~offsite_fl.models.tasks.TASKS`; None takes the one that the folder's config names.
        The emulator is made on ``device`` (None: CUDA or MPS where there is one, else the CPU).
        """
        model, processor = load_model(path, task)
        module: nn.Module = model
        return cls(module.to(resolve_device(TuneConfig(device=device))), processor, split, task=task, head=head)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ``ModelError`` if it is one for images."""
        return need_tokenizer(self.processor)

    @property
    def classes(self) -> Classes | None:
        """The classes of a classifier; None for all other models."""
        return classes_of(self.task, self.model.config)

    @property
    def pad_id(self) -> int:
        """Token id that fills short rows of a batch (they carry no loss)."""
        return pad_id_for(self.task, self.processor, self.model.config)

    def examples(self, source: Source, block_size: int, loss_on: LossOn = "all", *, labelled: bool = True) -> Dataset:
        """What ``source`` holds for this model; see :func:`offsite_fl.data.by_task.examples_for`."""
        return examples_for(
            self.task, source, self.processor, self.classes, block_size=block_size, loss_on=loss_on, labelled=labelled
        )

    # What leaves the house -------------------------------------------------------------------------------------

    def make_bundle(
        self,
        emulator: EmulatorMethod | str,
        out: str | Path,
        *,
        calibration: Source | None = None,
        calibration_tokens: int = 8192,
        block_size: int = 128,
        dtype: torch.dtype | None = None,
        shard_bytes: int | str = SHARD_BYTES,
        seed: int = 0,
        workdir: str | Path | None = None,
        progress: bool = False,
    ) -> Bundle:
        """Compress the middle, write adapter + emulator + shared tensors to ``out``, and the owner's map beside it.

        Args:
            emulator: a method or its spec, e.g. ``"low-rank:keep=0.5"``.
            out: folder of the bundle; it appears whole or not at all.
            calibration: public text (a file or ``datasets.Dataset``) for the methods that look at activations, and for
                the report; never a data owner's.
            calibration_tokens: how much of it is used; an eighth is held out for methods that validate.
            dtype: of emulator and shared tensors in the files; None keeps the model's. Adapter values are never cast.
            shard_bytes: bound of one file, an int or text like ``"256MB"``.
            seed: of everything random in the method.
            workdir: where long methods keep what they need to resume.
        """
        method = parse_emulator(emulator) if isinstance(emulator, str) else emulator
        context = self.context(calibration, calibration_tokens, block_size, seed, workdir, progress)
        began = time.perf_counter()
        built = method.compress(start(context), context)
        self.report = emulator_report(built, context, seconds=round(time.perf_counter() - began, 2))
        plan = self._plan(built)
        bundle = write_bundle(out, plan, self._tensors(built, plan, dtype), self.processor, shard_bytes=shard_bytes)
        self.report = replace(self.report, bytes=_emulator_bytes(bundle))  # as written: ``dtype`` may have cast them
        self.emulator = str(method)
        self._map(built, bundle).save(bundle.path)
        self._remember(bundle)
        return bundle

    def context(
        self,
        calibration: Source | None = None,
        tokens: int = 8192,
        block_size: int = 128,
        seed: int = 0,
        workdir: str | Path | None = None,
        progress: bool = False,
    ) -> Context:
        """What an emulator method may look at: this model, its cut, and public text as batches."""
        fit, held_out = self._batches(calibration, tokens, block_size, seed)
        return Context(
            model=self.model,
            blocks=self.blocks,
            adapter=self.adapter_indices,
            middle=self.split.middle(self.blocks.depth),
            head=self.head,
            calibration=fit,
            validation=held_out,
            device=str(next(self.model.parameters()).device),
            seed=seed,
            workdir=Path(workdir) if workdir is not None else None,
            progress=progress,
        )

    def _batches(
        self, source: Source | None, tokens: int, block_size: int, seed: int
    ) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
        if source is None:
            return (), ()
        examples = self.examples(source, block_size, labelled=self._labelled(source))
        examples = examples.select(range(min(len(examples), max(2, tokens // block_size))))
        fit, held_out = split_examples(examples, 1 / 8, seed)
        return self._loaded(fit), self._loaded(held_out)

    def set_nearest_mean_head(self, source: Source, *, block_size: int = 128, scale: float | None = None) -> None:
        """Begin with a nearest-class-mean head, from a few labelled public examples of each class.

        It is what a classifier's "full zero-shot" row measures, and what the data owners start from; see
        :func:`offsite_fl.heads.nearest_class_mean_head`. ``UpdateError`` once a bundle with another head is out.
        """
        if self.bundle is not None:
            raise UpdateError("the bundle that was handed out has another head: set the head before make_bundle()")
        batches = list(make_loader(self.examples(source, block_size), 8, pad_id=self.pad_id))
        nearest_class_mean_head(self.model, batches, self.head, scale)
        self._handed_out = self.adapter()

    def take_handed_out_head(self) -> None:
        """Put the head that was handed out into the full model: where that was made for the bundle, no file has it."""
        self._handed_out_bundle()
        with torch.no_grad():
            for name, parameter in head_parameters(self.model, self.head).items():
                parameter.copy_(self._handed_out[name])

    def _labelled(self, source: Source) -> bool:
        """Whether a classifier's calibration set tells classes, which methods that need a gradient ask for."""
        return self.task not in CLASSIFICATION or has_labels(source)

    def _loaded(self, examples: Dataset | None) -> tuple[Batch, ...]:
        return () if examples is None else tuple(make_loader(examples, 8, pad_id=self.pad_id, labelled=False))

    def _plan(self, emulator: Emulator) -> NetworkPlan:
        modules = [block.module for block in emulator.blocks]
        origins = [block.origin for block in emulator.blocks]
        return plan_network(
            self.model,
            self.blocks,
            self.adapter_indices,
            emulator.layout,
            modules,
            origins,
            task=self.task,
            head=self.head,
        )

    def _tensors(
        self, emulator: Emulator, plan: NetworkPlan, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Everything that leaves, under slot names: adapter blocks, emulator blocks, tensors outside the blocks."""
        tensors = shared_tensors(self.model, self.blocks, self.head)
        for prefix, module in self._parts(emulator):
            tensors |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
        if dtype is None:
            return tensors
        # The adapter keeps its values to the bit, packed weights and their scales their meaning.
        free = {n for n, spec in expected_tensors(plan).items() if spec.dtype is None and not n.startswith("adapter.")}
        return {name: tensor.to(dtype) if name in free else tensor for name, tensor in tensors.items()}

    def _parts(self, emulator: Emulator) -> list[tuple[str, nn.Module]]:
        stack = block_list(self.model, self.blocks)
        adapter = [(f"adapter.{slot}.", stack[index]) for slot, index in enumerate(self.adapter_indices)]
        return adapter + [(f"emulator.{slot}.", block.module) for slot, block in enumerate(emulator.blocks)]

    def _map(self, emulator: Emulator, bundle: Bundle) -> OwnerMap:
        """The owner's private note: which tensor of the bundle came from where in the full model."""
        sources = [*self.adapter_indices, *(block.origin for block in emulator.blocks)]
        slots = {
            prefix + name: f"{self.blocks.path}.{index}.{name}"
            for (prefix, module), index in zip(self._parts(emulator), sources, strict=True)
            for name in module.state_dict()
        }
        slots |= {name: name.removeprefix(HEAD) for name in head_parameters(self.model, self.head)}
        return OwnerMap(
            digest=bundle.digest,
            blocks_path=self.blocks.path,
            adapter=self.adapter_indices,
            slots=slots,
            split=str(self.split),
            emulator=self.emulator,
            fingerprint=fingerprint(self.model.state_dict(), self._adapter_paths()),
            report=asdict(self.report) if self.report else {},
        )

    def _adapter_paths(self) -> tuple[str, ...]:
        return (*(f"{self.blocks.path}.{index}." for index in self.adapter_indices), *self.head)

    def use_bundle(self, path: str | Path | Bundle) -> Bundle:
        """Take up a bundle that this owner made earlier; its map must fit this model and split."""
        bundle = path if isinstance(path, Bundle) else open_bundle(path)
        note = OwnerMap.load(bundle.path)
        note.check(digest=bundle.digest, model=self.model.state_dict())
        if note.adapter != self.adapter_indices:
            raise SplitError(f"the bundle was made with split {note.split}, this owner has {self.split}")
        if bundle.plan.head != self.head:
            raise BundleError(f"the bundle was made with head {bundle.plan.head}, this owner has {self.head}")
        self._remember(bundle)
        self.emulator, self.report = note.emulator, EmulatorReport.from_json(note.report)
        return bundle

    def _remember(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._handed_out = {n: t.float() for n, t in bundle.tensors().items() if n.startswith("adapter.")}

    def emulated(self, bundle: Bundle | None = None) -> nn.Module:
        """The network that the data owners run, adapter + emulator, with the signature of the full model."""
        return network_of(bundle or self._handed_out_bundle(), "float32")

    def _handed_out_bundle(self) -> Bundle:
        if self.bundle is None:
            raise UpdateError("there is no bundle yet: call make_bundle() or use_bundle() first")
        return self.bundle

    # What comes back -------------------------------------------------------------------------------------------

    def adapter(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter's values in the full model by slot name, fp32 on the CPU."""
        live = adapter_tensors(self.model, self.blocks, self.adapter_indices, self.head)
        return {name: p.detach().float().cpu().clone() for name, p in live.items()}

    def initial_state(self, lora: LoraOptions | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
        """What a federation starts from: the handed-out adapter; or fresh LoRA factors, B zero, and the head."""
        if lora is None:
            return dict(self._handed_out)
        head = {name: value for name, value in self._handed_out.items() if is_head(name)}
        return add_lora(self._adapter_copies(), lora, seed).tensors() | head

    def lora_targets(self, lora: LoraOptions) -> dict[str, bool]:
        """Slot names of the adapter's weights that ``lora`` gives factors, and whether each is stored transposed."""
        return target_weights(self._adapter_copies(), lora)

    def adapter_values(
        self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None, repair: Repair | None = None
    ) -> dict[str, torch.Tensor]:
        """Full adapter values for an update: its tensors, or the handed-out adapter with the factors merged.

        With a ``repair``, that is taken out of the change.
        """
        values = dict(tensors) if lora is None else merge_lora(self._adapter_copies(), tensors, lora)
        return values if repair is None else repair.taken_out(values, self._handed_out)

    def _adapter_copies(self) -> dict[int, nn.Module]:
        """fp32 copies of the adapter's blocks with the values that were handed out."""
        stack = block_list(self.model, self.blocks)
        copies = {slot: copy.deepcopy(stack[index]).float().cpu() for slot, index in enumerate(self.adapter_indices)}
        with torch.no_grad():
            for slot, block in copies.items():
                for name, parameter in block.named_parameters():
                    parameter.copy_(self._handed_out[f"adapter.{slot}.{name}"])
        return copies

    def measure_repair(self, public: Source, config: TuneConfig, *, share: float = 1.0, scale: float = 1.0) -> Repair:
        """What tuning by ``config`` on the handed-out emulator does only to put the emulator right.

        Plays a data owner on ``public`` text (of nobody's private data), on the emulator and on the full model, with
        the same batches; see :mod:`offsite_fl.repair`. ``config`` should be that of the data owners, with all their
        steps. Takes as long as two data owners do, and the memory of the full model and the emulator.
        """
        bundle = self._handed_out_bundle()
        config = replace(config, validation_share=0.0, patience=None, schedule_offset=0, lora_fresh=False)
        examples = self.examples(public, config.block_size, config.loss_on)
        on_emulator = DataOwner.open(bundle, config.frozen_dtype, config.device).tune(examples, config)
        context = self.context()
        # The values that were handed out, since the owner's model may have an update plugged in by now.
        network, plan = private_network(start(context), context, self._handed_out)
        on_full = tune_adapter(network, plan, examples, config, pad_id=self.pad_id)
        ours = self.adapter_values(on_emulator.tensors, config.lora)
        theirs = self.adapter_values(on_full.tensors, config.lora)
        tensors = {name: ours[name] - theirs[name] for name in ours}
        return Repair(tensors, bundle.digest, on_full.steps, share, scale)

    def plug_in(self, update: Update, repair: Repair | None = None) -> None:
        """Write an update into the full model: exactly the adapter's tensors change, or nothing and ``UpdateError``.

        The update must have been made for the bundle that this owner handed out last. Plugging a second update in
        replaces the first: both mean values (or factors on the handed-out adapter), not differences to what is there.
        With a ``repair`` (:meth:`measure_repair`), that is taken out of the update's change first.
        """
        for given, kind in ((update, Update), *(((repair, Repair),) if repair is not None else ())):
            if not isinstance(given, kind):
                raise UpdateError(
                    f"plug_in takes an {kind.__name__}, got {type(given).__name__}; {kind.__name__}.load(path) reads "
                    "a file"
                )
            if self.bundle is not None and given.digest != self.bundle.digest:
                raise UpdateError(
                    f"the {kind.__name__.lower()} was made for bundle {given.digest[:12]}, this owner handed out "
                    f"{self.bundle.digest[:12]}"
                )
        values = self.adapter_values(update.tensors, update.lora, repair)
        plug_in(self.model, self.blocks, self.adapter_indices, values, self.head)

    @contextmanager
    def plugged_in(
        self, tensors: Mapping[str, torch.Tensor], lora: LoraOptions | None = None, repair: Repair | None = None
    ) -> Iterator[nn.Module]:
        """The full model with ``tensors`` plugged in for the length of a ``with`` block; then as before to the bit."""
        values = self.adapter_values(tensors, lora, repair)
        with swapped_in(self.model, self.blocks, self.adapter_indices, values, self.head):
            yield self.model

    def save(self, folder: str | Path) -> Path:
        """Write the full model as it is now, with its tokenizer or image processor, as a Hugging Face folder."""
        folder = Path(folder)
        model: Any = self.model
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


def _emulator_bytes(bundle: Bundle) -> int:
    return sum(entry.bytes for name, entry in bundle.manifest.tensors().items() if name.startswith("emulator."))
