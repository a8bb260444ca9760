"""The grid in this process: what a node does to its message or raises is its own affair."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from simulations.in_process import InProcessGrid, separate, task_identity


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def content() -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.ones(2, np.float32))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"a": 1})})


def taking(message: Message, context: Context) -> Message:
    """Takes the array out of its message, as the reader of a bundle does; the second node fails."""
    message.content["arrays"].pop("w")
    if context.node_config["partition-id"] == 1:
        raise ValueError("no disk")
    return Message(RecordDict({"config": ConfigRecord({"client": context.node_config["name"]})}), reply_to=message)


def test_nodes_that_share_a_record_do_not_share_what_they_do_to_it() -> None:
    grid = InProcessGrid.of_partitions(taking, ["a", "b", "c"])
    shared = content()
    messages = [Message(shared, node, "train") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    assert list(shared["arrays"]) == ["w"]
    assert [reply.content["config"]["client"] for reply in replies if reply.has_content()] == ["a", "c"]
    assert replies[1].has_error() and replies[1].error.reason == "ValueError: no disk"
    ids = [message.metadata.message_id for message in messages]
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids and len(set(ids)) == 3


def test_a_node_keeps_its_context() -> None:
    def counting(message: Message, context: Context) -> Message:
        context.state.setdefault("seen", ConfigRecord({"n": 0}))["n"] += 1
        return Message(RecordDict({"config": ConfigRecord(dict(context.state["seen"]))}), reply_to=message)

    grid = InProcessGrid.of_partitions(counting, ["a", "b"])
    node = grid.get_node_ids()[0]
    counts = [grid.send_and_receive([Message(content(), node, "train")])[0].content["config"]["n"] for _ in range(2)]
    assert counts == [1, 2]
    assert grid.nodes[node] == {"num-partitions": 2, "partition-id": 0, "name": "a"}


def test_separate_records_share_their_arrays() -> None:
    one = content()
    other = separate(one)
    assert other["arrays"]["w"].data is one["arrays"]["w"].data
    other["config"]["a"] = 2
    del other["arrays"]["w"]
    assert one["config"]["a"] == 1 and "w" in one["arrays"]


def test_what_is_pushed_is_answered_once_when_it_is_pulled() -> None:
    grid = InProcessGrid.of_partitions(taking, ["a", "b", "c"])
    ids = list(grid.push_messages(Message(content(), node, "train") for node in grid.get_node_ids()))
    first = list(grid.pull_messages(ids[:2]))
    assert [reply.metadata.reply_to_message_id for reply in first] == ids[:2]
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids[2:]


def test_what_is_pushed_is_worked_on_when_it_is_pulled_and_once() -> None:
    worked: list[str] = []

    def noting(message: Message, context: Context) -> Message:
        worked.append(str(context.node_config["name"]))
        return taking(message, context)

    grid = InProcessGrid.of_partitions(noting, ["a", "b", "c"])
    ids = list(grid.push_messages(Message(content(), node, "train") for node in grid.get_node_ids()))
    assert not worked
    (reply,) = grid.pull_messages([ids[2]])
    assert worked == ["c"] and reply.metadata.reply_to_message_id == ids[2]
    assert [each.has_error() for each in grid.pull_messages(ids)] == [False, True] and worked == ["c", "a", "b"]
    assert not list(grid.pull_messages(ids))
