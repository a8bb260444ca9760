"""Which of the tuned values go back in a reply, and which values of the run's state such a reply stands for.

The state of a run is what travels down: the full adapter, or LoRA factors. Up travels what was trained: the same
tensors, or one of the two factors of each linear (``lora_train``), or factors on top of the adapter (``lora_fresh``).
A classifier's head is among what was trained each time, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord

from offsite_fl.config import Factors, TuneConfig
from offsite_fl.tuning.lora import added, first_components, padded, trained_names
from offsite_fl.wire.codecs import decode

Tensors = Mapping[str, torch.Tensor]


def beginning(received: Tensors, tune: TuneConfig, run: TuneConfig) -> Tensors:
    """What a client tunes from: the received values, or the first components of factors where its rank is smaller."""
    if run.kept_lora is None or tune.lora_rank == run.lora_rank:
        return received
    return first_components(received, tune.lora_rank)


def for_reply(tuned: Tensors, received: Tensors, run: TuneConfig, *, whole: bool) -> dict[str, torch.Tensor]:
    """The tensors of a reply, factors of a smaller rank filled up with zeros to the run's.

    ``whole`` adds the factors that weren't trained, as they came: privacy mods compare a reply with its message.
    """
    if run.lora is None:
        return {name: tuned[name] for name in received}
    filled = padded(tuned, run.lora_rank)
    if run.lora_fresh:
        return filled
    trained = {name: filled[name] for name in trained_names(received, run.lora_train)}
    return {name: trained.get(name, received[name]) for name in received} if whole else trained


def references(tensors: Tensors, reference: Tensors) -> dict[str, torch.Tensor]:
    """What the codec measures a reply's tensors from: the state's ``reference``, or zeros for fresh factors."""
    return {name: reference.get(name, torch.zeros_like(tensor)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class FreshFactors:
    """Replies that carry new LoRA factors on top of the full adapter that was sent.

    ``reference``: zeros by factor name, in the run's rank, and the head that was handed out. ``targets``: see
    :func:`offsite_fl.tuning.lora.target_weights`. ``scale``: alpha / rank of the run.
    """

    reference: Tensors
    targets: Mapping[str, bool]
    scale: float

    def read(self, arrays: ArrayRecord, config: ConfigRecord, codec: str, sent: Tensors) -> dict[str, torch.Tensor]:
        """The full adapter that a reply stands for: ``sent`` with ``scale * B A`` added."""
        return added(sent, decode(arrays, config, self.reference, codec), self.targets, self.scale)


def read_reply(
    arrays: ArrayRecord, config: ConfigRecord, codec: str, reference: Tensors, sent: Tensors, train: Factors
) -> dict[str, torch.Tensor]:
    """The state that a reply stands for, in the order of ``reference``.

    Factors that weren't to be trained are those that were ``sent``, whatever a reply says about them.
    """
    trained = trained_names(reference, train)
    short = arrays.keys() == set(trained)
    wanted = {name: reference[name] for name in trained} if short else reference
    found = decode(arrays, config, wanted, codec)
    kept = set(trained)
    return {name: found[name] if name in kept else sent[name] for name in reference}
