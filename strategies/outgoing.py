"""The wrapped strategy's messages made fit for the wire: encoded adapter, tuning settings, the bundle's digest."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from offsite_fl.config import TuneConfig, from_mapping, to_mapping
from offsite_fl.errors import ConfigError
from offsite_fl.wire import names
from offsite_fl.wire.codecs import decode, encode
from offsite_fl.wire.records import only_arrays, only_config
from offsite_fl.wire.settings import tune_of_round, tune_to_config

from .exchange import Mailing

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How adapter values travel in a run: codec, the values it measures differences from, and what goes with them."""

    digest: str
    codec: str
    reference: Tensors
    tune: TuneConfig

    def plain(self, arrays: ArrayRecord) -> dict[str, torch.Tensor]:
        """fp32 tensors of the record that the wrapped strategy works with."""
        return decode(arrays, ConfigRecord(), self.reference, "fp32")

    def settings(self, config: ConfigRecord, server_round: int) -> dict[str, Any]:
        """``tune.*`` of a round; entries that the caller put into Flower's ``train_config`` win."""
        given = {key: value for key, value in config.items() if key.startswith(names.TUNE)}
        tune = from_mapping(TuneConfig, to_mapping(self.tune, names.TUNE) | given, names.TUNE)
        if tune.lora != self.tune.lora:
            raise ConfigError("the LoRA settings can't change between rounds: the same tensors travel in all of them")
        return tune_to_config(tune_of_round(tune, server_round))


@dataclass
class Outgoing:
    """The messages of one exchange, and the adapter values that the nodes see after decoding."""

    messages: list[Message] = field(default_factory=list)
    sent: Tensors = field(default_factory=dict)
    mailing: Mailing = field(default_factory=Mailing)

    def posted(self) -> list[Message]:
        """Hand the messages over, keeping only what is needed to recognise the replies."""
        messages, self.messages = self.messages, []
        return messages


def prepare(messages: list[Message], form: Form, server_round: int, without: Container[int]) -> Outgoing:
    """New messages in place of ``messages``, except for the nodes in ``without``.

    New ones, because Flower gives all nodes the same record; encoded once for each array record that occurs.
    """
    outgoing = Outgoing()
    encoded: dict[int, tuple[ArrayRecord, ConfigRecord]] = {}
    tuning: dict[int, dict[str, Any]] = {}
    for message in messages:
        node = message.metadata.dst_node_id
        if node in without:
            continue
        arrays, config = only_arrays(message.content)[1], only_config(message.content)[1]
        if id(arrays) not in encoded:
            encoded[id(arrays)] = encode(form.plain(arrays), form.reference, form.codec)
        if id(config) not in tuning:
            tuning[id(config)] = form.settings(config, server_round)
        wired, notes = encoded[id(arrays)]
        settings = ConfigRecord({**config, **tuning[id(config)], **notes, names.DIGEST: form.digest})
        content = RecordDict({names.ARRAYS: wired, names.CONFIG: settings})
        outgoing.messages.append(Message(content, node, message.metadata.message_type, group_id=str(server_round)))
    for wired, notes in encoded.values():
        outgoing.sent = decode(wired, notes, form.reference, form.codec)
    outgoing.mailing = Mailing.of(outgoing.messages)
    return outgoing
