"""A train or evaluate message, read at a site: checked against the bundle and the settings that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ConfigRecord, Message, MessageType

from offsite_fl.config import TuneConfig
from offsite_fl.data.fingerprints import Fingerprints
from offsite_fl.data_owner import DataOwner, adapter_blocks
from offsite_fl.errors import WireError
from offsite_fl.local.algorithm import LocalAlgorithm, read_algorithm
from offsite_fl.local.answering import PatchMissing
from offsite_fl.local.open_network import networks
from offsite_fl.local.patch_store import PatchStore
from offsite_fl.local.site import Site
from offsite_fl.models.head import is_head
from offsite_fl.tuning.lora import expected_factors
from offsite_fl.wire import names
from offsite_fl.wire.backed import check_backed
from offsite_fl.wire.codecs import decode
from offsite_fl.wire.records import only_arrays, only_config, text
from offsite_fl.wire.settings import tune_from_config, tune_of_run


@dataclass(frozen=True)
class Task:
    """What a message asks for. ``tune`` is how this site tunes, ``run`` what the server asked of all.

    ``private``: whether one of Flower's privacy mods is around tuning. ``algorithm`` is what to do other than plain
    tuning, if anything. ``public``: of the examples that the emulator was aligned on.
    """

    owner: DataOwner
    config: ConfigRecord
    private: bool
    arrays_key: str
    tune: TuneConfig
    run: TuneConfig
    codec: str
    reference: Mapping[str, torch.Tensor]
    start: Mapping[str, torch.Tensor]
    algorithm: LocalAlgorithm | None
    public: Fingerprints | None

    @classmethod
    def read(cls, message: Message, site: Site, *, local_noise: bool) -> Task:
        """Read ``message``; whoever calls this holds the lock of the open network until the task is done.

        ``local_noise``: whether a mod of the app adds noise to replies. ``OffsiteError`` says what can't be done.
        """
        arrays_key, arrays = only_arrays(message.content)
        config = only_config(message.content)[1]
        digest = text(config.get(names.DIGEST), names.DIGEST)
        codec, private = (
            text(config.get(names.CODEC, "fp32"), names.CODEC),
            local_noise or names.CLIPPING_NORM in config,
        )
        tune, run = tune_from_config(config, site.context.node_config, site.name), tune_of_run(config)
        _check_private(private, codec, run)
        owner = networks.open(site.cache, digest, tune)
        owner.reset()  # nothing of another virtual client's round may stay
        public = _patch(owner, config, site)
        known = _reference(owner, run, arrays)
        algorithm = read_algorithm(config)
        if algorithm is not None:
            known = _travelling(algorithm, known, message, private)
        # In the order of the message: Flower's privacy mods compare the lists of keys.
        reference = {name: known[name] for name in [*(n for n in arrays if n in known), *known]}
        start = decode(arrays, config, reference, codec)
        return cls(owner, config, private, arrays_key, tune, run, codec, reference, start, algorithm, public)

    def notes(self, site: str) -> dict[str, Any]:
        """What every reply says of itself: who sends it, for which bundle, and which factors its emulator had."""
        notes: dict[str, Any] = {names.CLIENT: site, names.DIGEST: self.owner.bundle.digest}
        digest = self.owner.patch_digest
        return notes if digest is None else {**notes, names.PATCH: digest}


def _check_private(private: bool, codec: str, run: TuneConfig) -> None:
    if private and codec != "fp32":
        raise WireError(f"codec {codec!r} hides the values from the privacy mod, which needs fp32")
    if private and run.lora_fresh:
        raise WireError("a privacy mod compares a reply with its message, but fresh LoRA factors are other tensors")


def _patch(owner: DataOwner, config: ConfigRecord, site: Site) -> Fingerprints | None:
    """Give the emulator the factors that the message counts on, none if it names none."""
    owner.patch(None)
    if names.PATCH not in config:
        return None
    digest = text(config[names.PATCH], names.PATCH)
    found = PatchStore(site.kept, owner.bundle.digest, site.name).find(digest)
    if found is None:
        raise PatchMissing(f"the patch {digest[:12]} of the emulator isn't here, or is damaged")
    owner.patch(found[0])
    return found[1]


def _travelling(
    algorithm: LocalAlgorithm, known: Mapping[str, torch.Tensor], message: Message, private: bool
) -> dict[str, torch.Tensor]:
    """What ``message`` carries of the run's state, and beside it."""
    if message.metadata.message_type != MessageType.TRAIN:
        return algorithm.travels(known)
    beside = algorithm.beside(known)
    if beside and private:
        raise WireError(f"a privacy mod would count what {algorithm.name} sends beside the adapter as adapter")
    return {**algorithm.travels(known), **beside}


def _reference(owner: DataOwner, run: TuneConfig, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """What travelling values are differences from: the bundle's adapter, or zeros for LoRA factors and its head.

    No factor is made before the message's ``arrays`` were held to the shapes that its rank asks for.
    """
    shapes: dict[str, tuple[int, int]] = {}
    if run.lora is not None:
        shapes = expected_factors(adapter_blocks(owner.model, owner.plan), run.lora)
        check_backed(arrays, shapes)
    handed_out = {n: t.float() for n, t in owner.bundle.tensors().items() if n.startswith("adapter.")}
    if run.kept_lora is None:
        return handed_out
    factors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return factors | {name: value for name, value in handed_out.items() if is_head(name)}
