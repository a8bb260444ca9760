"""A Flower grid whose nodes come in the order of the clients' numbers, so that sampling is the same in every run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from offsite_fl.errors import OffsiteError
from offsite_fl.wire import names

PATIENCE = 120.0


class OrderedGrid(Grid):
    """``grid`` with its nodes sorted. Flower numbers nodes at random and samples from them in that order.

    ``told`` is put into the config of every message, beside what is counted as sent.
    """

    def __init__(self, grid: Grid, clients: int, digest: str, told: Mapping[str, str] | None = None) -> None:
        self.inner, self.told = grid, dict(told or {})
        self._order = _order(grid, clients, digest)

    def get_node_ids(self) -> Iterable[int]:
        """In the order of the clients' numbers."""
        return list(self._order)

    def set_run(self, run: Any) -> None:
        """As the grid inside does."""
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        """Of the grid inside."""
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the grid inside does."""
        return self.inner.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid inside does."""
        return self.inner.push_messages(self._telling(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid inside does."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As the grid inside does."""
        return self.inner.send_and_receive(self._telling(messages), timeout=timeout)

    def _telling(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            config = message.content.config_records.get(names.CONFIG)
            if config is not None:
                config.update(self.told)
            yield message


def _order(grid: Grid, clients: int, digest: str) -> list[int]:
    """Ask all nodes for their names, ``client-<number>``, once as many as wanted are there."""
    deadline = time.monotonic() + PATIENCE
    while len(nodes := list(grid.get_node_ids())) < clients:
        if time.monotonic() > deadline:
            raise OffsiteError(f"{len(nodes)} of {clients} simulated clients came up within {PATIENCE:.0f} s")
        time.sleep(0.2)
    question = RecordDict({names.CONFIG: ConfigRecord({names.DIGEST: digest})})
    messages = [Message(question, node, names.QUERY_BUNDLE) for node in nodes]
    numbers: dict[int, int] = {}
    for reply in grid.send_and_receive(messages, timeout=600.0):
        if reply.has_error():
            raise OffsiteError(f"a simulated client doesn't answer: {reply.error.reason}")
        name = str(reply.content.config_records[names.CONFIG][names.CLIENT])
        numbers[reply.metadata.src_node_id] = int(name.rpartition("-")[2])
    return sorted(numbers, key=lambda node: numbers[node])
