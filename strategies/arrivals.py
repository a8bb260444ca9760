"""Replies one by one as they come in, and when a round stops waiting for more."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from offsite_fl.config import check

from .journal import log

POLL = 3.0  # seconds between two looks for replies, as in Flower's own send_and_receive


@dataclass(frozen=True)
class Waiting:
    """How a round takes its replies and how long it waits for them, in tuning and in evaluation alike.

    ``streaming``: each reply is folded into the mean as it comes. ``round_deadline``: seconds after which nobody is
    waited for, in place of the ``timeout`` of ``start``. ``quorum``: good replies that are enough. None: all.
    """

    streaming: bool = False
    round_deadline: float | None = None
    quorum: int | None = None

    def __post_init__(self) -> None:
        deadline, quorum = self.round_deadline, self.quorum
        check(deadline is None or 0 < deadline < math.inf, f"round-deadline must be seconds above 0, got {deadline}")
        check(quorum is None or quorum >= 1, f"quorum must be at least 1, got {quorum}")

    def exchange(self, grid: Grid, messages: Iterable[Message], timeout: float) -> Iterable[Message]:
        """Send, and give the replies: as they come where any of the three is asked for, else by Flower's own loop."""
        ready = list(messages)
        if not ready:
            return []
        if self == Waiting():
            return _let_go(deque(grid.send_and_receive(ready, timeout=timeout)))
        return arrivals(grid, ready, timeout if self.round_deadline is None else self.round_deadline)

    @property
    def too_late(self) -> str:
        """Why a node that wasn't heard of when the time was over is left out."""
        if self.round_deadline is None:
            return "no answer in time"
        return f"no answer within the round's deadline of {self.round_deadline:g} s"

    @property
    def not_needed(self) -> str:
        """Why a node that wasn't heard of when enough replies were good is left out."""
        return f"the round had its quorum of {self.quorum} good replies"


def _let_go(replies: deque[Message]) -> Iterator[Message]:
    """The same, each held by nobody but the one who takes it."""
    while replies:
        yield replies.popleft()


def arrivals(grid: Grid, messages: list[Message], seconds: float) -> Iterator[Message]:
    """Push ``messages`` and yield each reply as it comes, errors too, until all are in or ``seconds`` have passed.

    Asks for one reply at a time and keeps none, so that those that wait their turn stay in the SuperLink. What has come
    when the time is over still counts. Whoever has enough just stops iterating.
    """
    pending = [message_id for message_id in grid.push_messages(messages) if message_id]
    if len(pending) < len(messages):
        log.warning("%d of %d messages couldn't be sent", len(messages) - len(pending), len(messages))
    end = time.monotonic() + seconds
    while pending:
        last, before = time.monotonic() >= end, len(pending)
        for message_id in tuple(pending):
            replies = deque(grid.pull_messages([message_id]))
            if replies:
                pending.remove(message_id)
            yield from _let_go(replies)
        if last:
            return
        if len(pending) == before:
            time.sleep(min(POLL, max(0.0, end - time.monotonic())))
