"""A Flower grid in one process: messages are serialised, handed to a client, and the reply comes back the same way."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from offsite_fl.wire.codecs import decode, encode

Client = Callable[[Message, Context], Message]
Tamper = Callable[[Message], "Message | list[Message] | None"]


@contextlib.contextmanager
def task_identity() -> Iterator[None]:
    """Messages can be made outside of a run; Flower keeps this in a private module, used only here."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


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
class FakeGrid(Grid):
    """Nodes that run ``client``, one after the other.

    ``nodes`` maps node ids to node configs. ``tamper`` sees every reply and may change, drop or multiply it. For those
    who pull, a reply is there ``seconds(message)`` after the message was pushed, by ``clock``, and is made only then.
    """

    client: Client
    nodes: dict[int, dict[str, Any]]
    tamper: Tamper | None = None
    log: list[Sent] = field(default_factory=list)
    contexts: dict[int, Context] = field(default_factory=dict)
    seconds: Callable[[Message], float] = lambda message: 0.0
    clock: Callable[[], float] = time.monotonic
    pushed: dict[str, tuple[float, Message]] = field(default_factory=dict)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(self._post(message))
            self.pushed[ids[-1]] = (self.clock() + self.seconds(message), message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = [(i, self.pushed[i]) for i in message_ids if i in self.pushed]
        ready = [self.pushed.pop(i)[1] for i, (when, _) in asked if when <= self.clock()]
        return [reply for message in ready for reply in self._replies(message)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies: list[Message] = []
        for message in messages:
            self._post(message)
            replies.extend(self._replies(message))
        return replies

    def _post(self, message: Message) -> str:
        message_id = uuid.uuid4().hex
        message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
        arrays = sum(len(a.data) for record in message.content.array_records.values() for a in record.values())
        self.log.append(Sent(message.metadata.dst_node_id, message.metadata.message_type, arrays))
        return message_id

    def _replies(self, message: Message) -> list[Message]:
        reply = self._handle(message, message.metadata.dst_node_id)
        if self.tamper is None:
            return [reply]
        made = self.tamper(reply)
        return made if isinstance(made, list) else [made] if made is not None else []

    def _handle(self, message: Message, node: int) -> Message:
        context = self.contexts.setdefault(node, Context(1, node, self.nodes[node], RecordDict(), {}))
        try:
            received = Message(carried(message.content), node, message.metadata.message_type)
            received.metadata.__dict__.update(message.metadata.__dict__)
            reply = self.client(received, context)
            if reply.has_content():
                reply.content = carried(reply.content)
            return reply
        except Exception as error:  # as Flower's workers do
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    def types(self, message_type: str) -> list[int]:
        """Nodes that got a message of this type, in order."""
        return [sent.node for sent in self.log if sent.type == message_type]


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
