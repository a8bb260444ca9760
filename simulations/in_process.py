"""A Flower grid in this process, without Ray and without serialisation: for tables of many short federations."""

from __future__ import annotations

import contextlib
import copy
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from offsite_fl.wire.records import records_of

Client = Callable[[Message, Context], Message]


@contextlib.contextmanager
def task_identity() -> Iterator[None]:
    """Let messages be made outside of a Flower run. Flower keeps this in a private module, so it may move."""
    before = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


def separate(content: RecordDict) -> RecordDict:
    """New records around the same arrays: who takes arrays out, or puts others in, changes nobody else's message."""
    arrays = {key: ArrayRecord(dict(record)) for key, record in records_of(content, ArrayRecord).items()}
    metrics = {key: MetricRecord(dict(record)) for key, record in records_of(content, MetricRecord).items()}
    configs = {key: ConfigRecord(dict(record)) for key, record in records_of(content, ConfigRecord).items()}
    return RecordDict({**arrays, **metrics, **configs})


@dataclass
class InProcessGrid(Grid):
    """Nodes that run ``client`` one after the other. ``nodes``: node configs by node id.

    What is pushed is worked on when its reply is pulled, so replies that nobody pulls take no memory.
    """

    client: Client
    nodes: dict[int, dict[str, Any]]
    contexts: dict[int, Context] = field(default_factory=dict, kw_only=True)
    pushed: dict[str, Message] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of_partitions(cls, client: Client, names: Iterable[str]) -> InProcessGrid:
        """Nodes with the node config that Flower's simulation gives them, and a name."""
        named = list(names)
        config = {"num-partitions": len(named)}
        return cls(client, {100 + i: {**config, "partition-id": i, "name": name} for i, name in enumerate(named)})

    def set_run(self, run: Run) -> None:
        """Nothing to do: there is one run."""

    @property
    def run(self) -> Run:
        """An empty run."""
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """A message."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take the messages in; the result has an id for each."""
        given = {self._identify(message): message for message in messages}
        self.pushed |= given
        return list(given)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to those of the messages that weren't answered yet."""
        return [self._reply(self.pushed.pop(message_id)) for message_id in message_ids if message_id in self.pushed]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The nodes' replies, in the order of the messages; what a node raises is an error reply, as in Flower."""
        return self.pull_messages(self.push_messages(messages))

    def _identify(self, message: Message) -> str:
        message_id = uuid.uuid4().hex
        message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do when they push
        return message_id

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = self.contexts.setdefault(node, Context(1, node, self.nodes[node], RecordDict(), {}))
        received = copy.copy(message)
        received.content = self._carried(message.content)
        try:
            reply = self.client(received, context)
            if reply.has_content():
                reply.content = self._carried(reply.content)
            return reply
        except Exception as error:  # a client app is foreign code
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)

    def _carried(self, content: RecordDict) -> RecordDict:
        """What arrives of a message's content, either way."""
        return separate(content)
