"""Nodes in the order of the clients' numbers, whatever Flower calls them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from offsite_fl.comparing import ordered
from offsite_fl.errors import OffsiteError
from offsite_fl.wire import names
from simulations.in_process import task_identity
from tests.flower_fakes import FakeGrid


@pytest.fixture(autouse=True)
def _in_a_run() -> Iterator[None]:
    with task_identity():
        yield


def answer(message: Message, context: Context) -> Message:
    name = f"client-{context.node_config['partition-id']}"
    return Message(RecordDict({names.CONFIG: ConfigRecord({names.CLIENT: name})}), reply_to=message)


def test_by_number_and_not_by_text_or_node() -> None:
    nodes = {5: 10, 99: 2, 1: 0, 42: 9, 7: 1}
    grid = FakeGrid(answer, {node: {"partition-id": number} for node, number in nodes.items()})
    assert ordered.OrderedGrid(grid, 5, "digest").get_node_ids() == [1, 7, 99, 42, 5]


def test_every_message_is_told_what_is_the_cells() -> None:
    seen: list[dict[str, object]] = []

    def noting(message: Message, context: Context) -> Message:
        seen.append(dict(message.content.config_records.get("config", {})))
        return answer(message, context)

    grid = ordered.OrderedGrid(FakeGrid(noting, {1: {"partition-id": 0}}), 1, "digest", {"compare.state": "here"})
    config = {"patch.digest": "p"}
    list(grid.send_and_receive([Message(RecordDict({"config": ConfigRecord(config)}), 1, "train.patch")]))
    ids = grid.push_messages([Message(RecordDict({"config": ConfigRecord(config)}), 1, "evaluate")])
    list(grid.pull_messages(ids))
    list(grid.send_and_receive([Message(RecordDict(), 1, "query")]))
    assert seen[1:] == [{**config, "compare.state": "here"}] * 2 + [{}]


def test_clients_that_do_not_answer_or_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = FakeGrid(lambda m, c: Message(Error(200, "out of order"), reply_to=m), {1: {}})
    with pytest.raises(OffsiteError, match="out of order"):
        ordered.OrderedGrid(grid, 1, "digest")
    monkeypatch.setattr(ordered, "PATIENCE", 0.3)
    with pytest.raises(OffsiteError, match="1 of 2 simulated clients"):
        ordered.OrderedGrid(grid, 2, "digest")
