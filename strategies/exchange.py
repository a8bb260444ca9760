"""Messages out, replies in: which reply belongs to which node, and which nodes gave none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from offsite_fl.evaluation.ledger import Kind
from offsite_fl.wire import names
from offsite_fl.wire.records import records_of, text

from .journal import Journal


@dataclass(frozen=True)
class Answer:
    """A reply that can be read."""

    node: int
    message: Message


@dataclass(frozen=True)
class NoAnswer:
    """Why there is nothing to read from a node. ``code`` is that of its error reply, if it sent one."""

    node: int
    reason: str
    code: int | None = None


@dataclass
class Mailing:
    """The messages of one exchange. Flower gives a message its id when it is pushed, so ids are looked up late."""

    sent: dict[int, Metadata] = field(default_factory=dict)
    heard_of: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, messages: Iterable[Message]) -> Mailing:
        """Remember the metadata of ``messages`` (not their contents)."""
        return cls({message.metadata.dst_node_id: message.metadata for message in messages})

    def sender(self, reply: Message) -> int:
        """Node that a reply is about. Flower itself answers, as node 1, in place of a node that went away."""
        for node, metadata in self.sent.items():
            if metadata.message_id and metadata.message_id == reply.metadata.reply_to_message_id:
                return node
        return int(reply.metadata.src_node_id)

    def opened(self, replies: Iterable[Message]) -> Iterator[Answer | NoAnswer]:
        """What each reply is, as they come; the first one of a node counts. Holds on to none of them."""
        return map(self._open, replies)

    def _open(self, reply: Message) -> Answer | NoAnswer:
        node = self.sender(reply)
        if node not in self.sent:
            return NoAnswer(node, "answered without being asked")
        if node in self.heard_of:
            return NoAnswer(node, "answered twice; the first answer counts")
        self.heard_of.add(node)
        if reply.has_error():
            return NoAnswer(node, error_text(reply), reply.error.code)
        if not reply.has_content():
            return NoAnswer(node, "an answer without content")
        return Answer(node, reply)

    def missing(self, reason: str) -> list[NoAnswer]:
        """The nodes that weren't heard of so far, each with ``reason``; from now on they count as heard of."""
        silent = [node for node in self.sent if node not in self.heard_of]
        self.heard_of.update(silent)
        return [NoAnswer(node, reason) for node in silent]

    def sort(self, replies: Iterable[Message]) -> tuple[list[Answer], list[NoAnswer]]:
        """Answers, one a node in the order of the mailing, and for all other nodes and replies the reason."""
        found = list(self.opened(replies))
        answers = {answer.node: answer for answer in found if isinstance(answer, Answer)}
        bad = [each for each in found if isinstance(each, NoAnswer)] + self.missing("no answer in time")
        return [answers[node] for node in self.sent if node in answers], bad


def error_text(reply: Message) -> str:
    """The reason of an error reply on one line."""
    reason = text(reply.error.reason or "", "reason") or "no reason given"
    if reply.error.code in (names.REFUSED, names.BUNDLE_MISSING, names.PATCH_MISSING, names.NO_VALIDATION):
        return reason
    return f"error {reply.error.code}: {reason}"


def ask(
    grid: Grid,
    journal: Journal,
    server_round: int,
    kind: Kind,
    contents: Mapping[int, RecordDict],
    message_type: str,
    timeout: float,
) -> tuple[list[Answer], list[NoAnswer]]:
    """Send one message to each node, wait, and sort the answers; see :meth:`Mailing.sort`."""
    messages = [Message(content, node, message_type) for node, content in contents.items()]
    for message in messages:
        journal.count(server_round, kind, "down", message.metadata.dst_node_id, message.content)
    good, bad = Mailing.of(messages).sort(grid.send_and_receive(messages, timeout=timeout))
    for answer in good:
        journal.learn(answer.node, answer.message.content)
        journal.count(server_round, kind, "up", answer.node, answer.message.content)
    return good, bad


def config_of(content: RecordDict) -> ConfigRecord:
    """The entries of the only config record of a reply; empty where there is none, as custom client apps have it."""
    records = list(records_of(content, ConfigRecord).values())
    return records[0] if len(records) == 1 else ConfigRecord()
