"""A Flower grid in one process: messages are serialised, handed to a client, and the reply comes back the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from offsite_fl.wire.codecs import decode, encode
from simulations.in_process import InProcessGrid

Tamper = Callable[[Message], "Message | list[Message] | None"]


def carried(content: RecordDict) -> RecordDict:
    """A copy of a message's content that went through Flower's serialisation."""
    return recorddict_from_proto(recorddict_to_proto(content))


@dataclass
class Sent:
    """One message that went out."""

    node: int
    type: str
    array_bytes: int


@dataclass
class FakeGrid(InProcessGrid):
    """Nodes that run ``client``, one after the other, behind Flower's serialisation.

    ``tamper`` sees every reply and may change, drop or multiply it. For those who pull, a reply is there
    ``seconds(message)`` after the message was pushed, by ``clock``, and is made only then.
    """

    tamper: Tamper | None = None
    log: list[Sent] = field(default_factory=list)
    seconds: Callable[[Message], float] = lambda message: 0.0
    clock: Callable[[], float] = time.monotonic
    due: dict[str, float] = field(default_factory=dict)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        self.due |= {i: self.clock() + self.seconds(self.pushed[i]) for i in ids}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [i for i in message_ids if i in self.pushed and self.due[i] <= self.clock()]
        return [reply for i in ready for reply in self._replies(self.pushed.pop(i))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        pushed = InProcessGrid.push_messages(self, messages)  # whoever waits isn't told when
        return [reply for i in pushed for reply in self._replies(self.pushed.pop(i))]

    def _identify(self, message: Message) -> str:
        arrays = sum(len(a.data) for record in message.content.array_records.values() for a in record.values())
        self.log.append(Sent(message.metadata.dst_node_id, message.metadata.message_type, arrays))
        return super()._identify(message)

    def _replies(self, message: Message) -> list[Message]:
        reply = self._reply(message)
        if self.tamper is None:
            return [reply]
        made = self.tamper(reply)
        return made if isinstance(made, list) else [made] if made is not None else []

    def _carried(self, content: RecordDict) -> RecordDict:
        return carried(content)

    def types(self, message_type: str) -> list[int]:
        """Nodes that got a message of this type, in order."""
        return [sent.node for sent in self.log if sent.type == message_type]


def all_nodes(count: int) -> dict[str, Any]:
    """Arguments for a Flower strategy that wants all of ``count`` nodes in every round."""
    return {"min_train_nodes": count, "min_evaluate_nodes": count, "min_available_nodes": count}


class Adder:
    """A client that has every bundle and adds ``amount(node config, round)`` to each value of the adapter.

    It speaks every codec; those that carry differences need the ``reference``.
    """

    def __init__(
        self,
        amount: Callable[[dict[str, Any], int], float],
        *,
        held: bool = True,
        reference: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.amount, self.held, self.reference = amount, held, reference

    def __call__(self, message: Message, context: Context) -> Message:
        name = str(context.node_config.get("name", context.node_id))
        if message.metadata.message_type == "query.bundle":
            state = ConfigRecord({"bundle.held": self.held, "client": name, "bundle.missing": ["manifest.json"]})
            return Message(RecordDict({"config": state}), reply_to=message)
        if message.metadata.message_type == "evaluate":
            metrics = MetricRecord({"loss": 1.0, "num-examples": 1})
            return Message(RecordDict({"metrics": metrics, "config": ConfigRecord({"client": name})}), reply_to=message)
        config = next(iter(message.content.config_records.values()))
        shift = self.amount(dict(context.node_config), int(config["server-round"]))
        key, arrays = next(iter(message.content.array_records.items()))
        if "wire.codec" not in config:  # a strategy without the wrapper
            moved = {name: Array(array.numpy() + np.float32(shift)) for name, array in arrays.items()}
            metrics = MetricRecord({"num-examples": int(context.node_config.get("examples", 1)), "train_loss": 1.0})
            return Message(RecordDict({key: ArrayRecord(moved), "metrics": metrics}), reply_to=message)
        codec = str(config["wire.codec"])
        like = self.reference or {name: torch.zeros(tuple(array.shape)) for name, array in arrays.items()}
        tensors = decode(arrays, config, {name: like[name] for name in arrays}, codec)
        wired, notes = encode({name: value + shift for name, value in tensors.items()}, like, codec)
        metrics = MetricRecord({"num-examples": int(context.node_config.get("examples", 1)), "train_loss": 1.0})
        content = RecordDict({key: wired, "metrics": metrics, "config": ConfigRecord({**notes, "client": name})})
        return Message(content, reply_to=message)
