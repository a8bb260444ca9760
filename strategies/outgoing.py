"""The wrapped strategy's messages made fit for the wire: encoded adapter, tuning settings, the bundle's digest."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from offsite_fl.config import Factors, TuneConfig, from_mapping, to_mapping
from offsite_fl.errors import ConfigError
from offsite_fl.local.algorithm import LocalAlgorithm
from offsite_fl.tuning.lora import trained_names
from offsite_fl.wire import names
from offsite_fl.wire.beside import parted
from offsite_fl.wire.codecs import decode, encode
from offsite_fl.wire.records import only_arrays, only_config
from offsite_fl.wire.replies import FreshFactors, read_reply
from offsite_fl.wire.settings import tune_of_round, tune_to_config

from .exchange import Mailing

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How adapter values travel in a run: codec, the values it measures differences from, and what goes with them.

    ``reference`` has the names of the run's state, which is what travels down. Replies carry the same, or one of the
    two factors of each linear, or, with ``fresh``, factors on top of the state. Where clients run ``algorithm`` instead
    of plain tuning, its ``part`` is theirs, ``reference`` has what it lets travel of the state, and ``beside`` what
    travels down beside that.
    """

    digest: str
    codec: str
    reference: Tensors
    tune: TuneConfig
    fresh: FreshFactors | None = None
    beside: Tensors = field(default_factory=dict)
    part: LocalAlgorithm | None = None

    @property
    def algorithm(self) -> str | None:
        """Name of what clients run; None is plain tuning."""
        return None if self.part is None else self.part.name

    def plain(self, arrays: ArrayRecord) -> dict[str, torch.Tensor]:
        """fp32 tensors of the record that the wrapped strategy works with."""
        return decode(arrays, ConfigRecord(), self.reference, "fp32")

    def settings(self, config: ConfigRecord, server_round: int) -> dict[str, Any]:
        """``tune.*`` of a round; entries that the caller put into Flower's ``train_config`` win."""
        given = {key: value for key, value in config.items() if key.startswith(names.TUNE)}
        tune = from_mapping(TuneConfig, to_mapping(self.tune, names.TUNE) | given, names.TUNE)
        if (tune.lora, tune.lora_fresh) != (self.tune.lora, self.tune.lora_fresh):
            raise ConfigError("the LoRA settings can't change between rounds: the same tensors travel in all of them")
        return tune_to_config(tune_of_round(tune, server_round))

    def read(self, arrays: ArrayRecord, config: ConfigRecord, sent: Tensors, train: Factors) -> dict[str, torch.Tensor]:
        """The state that a reply stands for, fp32; ``train``: the factors that this round trains."""
        if self.fresh is not None:
            return self.fresh.read(arrays, config, self.codec, sent)
        return read_reply(arrays, config, self.codec, self.reference, sent, train)

    def derived(self, sent: Tensors, values: Tensors, metrics: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """What a reply with these values and metrics means beside the state, fp32; see :class:`LocalAlgorithm`."""
        return {} if self.part is None else self.part.derived(sent, values, metrics)


@dataclass
class Outgoing:
    """The messages of one exchange, and the adapter values, and those ``beside``, that the nodes see after decoding.

    Fresh factors are a change, so there ``sent`` is the state as the server has it: what the codec rounds on the way
    down is not lost from it. ``train`` says which LoRA factors the messages ask for.
    """

    messages: list[Message] = field(default_factory=list)
    sent: Tensors = field(default_factory=dict)
    beside: Tensors = field(default_factory=dict)
    mailing: Mailing = field(default_factory=Mailing)
    train: Factors = "both"

    def posted(self) -> list[Message]:
        """Hand the messages over, keeping only what is needed to recognise the replies."""
        messages, self.messages = self.messages, []
        return messages

    def with_kept(self, arrays: ArrayRecord) -> ArrayRecord:
        """``arrays`` with the factors that weren't trained as they were sent: an average of equal values rounds."""
        if self.train == "both":
            return arrays
        trained = set(trained_names(arrays, self.train))
        kept = {name: self.sent[name] for name in arrays if name not in trained}
        return ArrayRecord({**arrays, **encode(kept, kept)[0]})


def prepare(messages: list[Message], form: Form, server_round: int, without: Container[int]) -> Outgoing:
    """New messages in place of ``messages``, except for the nodes in ``without``.

    New ones, because Flower gives all nodes the same record; encoded once for each array record that occurs.
    """
    outgoing = Outgoing()
    encoded: dict[int, tuple[ArrayRecord, ConfigRecord]] = {}
    state: Tensors = {}
    tuning: dict[int, dict[str, Any]] = {}
    for message in messages:
        node = message.metadata.dst_node_id
        if node in without:
            continue
        arrays, config = only_arrays(message.content)[1], only_config(message.content)[1]
        if id(arrays) not in encoded:
            own, beside = parted(arrays)
            state = form.plain(own)
            every = {**state, **decode(beside, ConfigRecord(), form.beside, "fp32")}
            encoded[id(arrays)] = encode(every, {**form.reference, **form.beside}, form.codec)
        if id(config) not in tuning:
            tuning[id(config)] = form.settings(config, server_round)
        wired, notes = encoded[id(arrays)]
        settings = ConfigRecord({**config, **tuning[id(config)], **notes, names.DIGEST: form.digest})
        content = RecordDict({names.ARRAYS: wired, names.CONFIG: settings})
        outgoing.messages.append(Message(content, node, message.metadata.message_type, group_id=str(server_round)))
    for wired, notes in encoded.values():
        own, beside = parted(wired)
        outgoing.beside = decode(beside, notes, form.beside, form.codec)
        outgoing.sent = decode(own, notes, form.reference, form.codec) if form.fresh is None else state
    outgoing.train = _agreed([settings[names.TUNE + "lora-train"] for settings in tuning.values()])
    outgoing.mailing = Mailing.of(outgoing.messages)
    return outgoing


def _agreed(asked: list[Factors]) -> Factors:
    if len(set(asked)) > 1:
        raise ConfigError(f"the messages of one round ask for different LoRA factors: {sorted(set(asked))}")
    return asked[0] if asked else "both"
