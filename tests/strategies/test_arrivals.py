"""Replies as they come, rounds that end at a deadline or with a quorum, and late replies, by a clock that is ours."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from offsite_fl.errors import CheckpointError, ConfigError
from offsite_fl.strategies.arrivals import POLL, Waiting, arrivals
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap

SHIFTS = [1.0, 2.0, 4.0]
A, B, C = sites(3)


class Clock:
    """Time passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= POLL
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("offsite_fl.strategies.arrivals.time", clock)
    return clock


def grid(clock: Clock, seconds: dict[int, float], tamper: Any = None) -> FakeGrid:
    """Three sites that add 1, 2 and 4; a reply to ``train`` is there after ``seconds``, to ``evaluate`` at once."""
    client = Adder(lambda node, r: SHIFTS[node["index"]])

    def of(message: Message) -> float:
        return seconds[message.metadata.dst_node_id] if message.metadata.message_type == "train" else 0.0

    return FakeGrid(client, sites(3), tamper, seconds=of, clock=clock.monotonic)


def asked(of: Iterable[int] = (A, B, C)) -> list[Message]:
    return [Message(RecordDict(), node, "query.bundle") for node in of]


def with_seconds(clock: Clock, seconds: Callable[[int], float]) -> FakeGrid:
    every = FakeGrid(Adder(lambda n, r: 0.0), sites(3), clock=clock.monotonic)
    every.seconds = lambda message: seconds(message.metadata.dst_node_id)
    return every


def fedavg(evaluate: float = 0.0, **options: Any) -> Any:
    return wrap(FedAvg(**{**all_nodes(3), "fraction_evaluate": evaluate}), **options)


def shift(after: dict[str, torch.Tensor]) -> float:
    return float(after["adapter.1.b"] - FIRST["adapter.1.b"])


def reasons(strategy: Any, server_round: int = 1) -> dict[str, str]:
    return {dropped.node: dropped.reason for dropped in strategy.history[server_round].dropped}


# One exchange ----------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_in_which_they_are_there(clock: Clock) -> None:
    # looks at 0, 3, 6 and 9 seconds
    every = with_seconds(clock, {A: 7.0, B: 1.0, C: 4.0}.__getitem__)
    assert [reply.metadata.src_node_id for reply in arrivals(every, asked(), 60.0)] == [B, C, A]
    assert clock.now == 1009.0


@pytest.mark.parametrize(("last", "there"), [(5.0, [B, C, A]), (5.01, [B, C])])
def test_what_is_there_when_the_time_is_over_counts_and_no_more(clock: Clock, last: float, there: list[int]) -> None:
    every = with_seconds(clock, {A: last, B: 0.0, C: 3.0}.__getitem__)
    assert [reply.metadata.src_node_id for reply in arrivals(every, asked(), 5.0)] == there
    assert clock.now == 1005.0


def test_one_reply_is_asked_for_at_a_time_and_none_twice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    every = with_seconds(clock, {A: 0.0, B: 4.0, C: math.inf}.__getitem__)
    pull, seen, answered = every.pull_messages, [], set()  # type: ignore[var-annotated]

    def watched(message_ids: Iterable[str]) -> list[Message]:
        (one,) = message_ids
        assert one not in answered
        replies = pull([one])
        seen.append(one)
        answered.update({one} if replies else ())
        return replies

    monkeypatch.setattr(every, "pull_messages", watched)
    assert len(list(arrivals(every, asked(), 10.0))) == 2
    # a, b, c at 0, b and c once more because a came, both at 3 and at 6, c once more because b came, and at 9 and 10
    assert len(seen) == 3 + 2 + 2 + 2 + 1 + 1 + 1 and len(set(seen)) == 3


def test_who_stops_iterating_takes_no_more(clock: Clock) -> None:
    every = with_seconds(clock, lambda node: 0.0)
    assert next(iter(arrivals(every, asked(), 60.0))).metadata.src_node_id == A
    assert len(every.pushed) == 2  # still in the grid, never made


def test_messages_that_flower_could_not_push_are_not_waited_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    every = with_seconds(clock, lambda node: 0.0)
    push = every.push_messages
    monkeypatch.setattr(every, "push_messages", lambda messages: [None, *push(messages)[1:]])
    assert [reply.metadata.src_node_id for reply in arrivals(every, asked(), math.inf)] == [B, C]
    assert "1 of 3 messages couldn't be sent" in caplog.text
    monkeypatch.setattr(every, "push_messages", lambda messages: [])  # too large for the SuperLink: all of them
    assert list(arrivals(every, asked(), math.inf)) == [] and clock.now == 1000.0


def test_without_any_of_it_flower_s_own_loop_is_used(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    every = with_seconds(clock, lambda node: 0.0)
    monkeypatch.setattr(every, "pull_messages", None)
    assert len(list(Waiting().exchange(every, asked(), 60.0))) == 3
    assert list(Waiting(streaming=True).exchange(every, [], 60.0)) == []
    assert not every.pushed


# Rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_stragglers_are_cut_off_at_the_deadline(
    clock: Clock, streaming: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    strategy = fedavg(streaming=streaming, round_deadline=30.0)
    after = run(strategy, grid(clock, {A: 1.0, B: 30.0, C: 31.0}))
    assert shift(after) == 1.5  # of a and b
    assert reasons(strategy) == {"c": "no answer within the round's deadline of 30 s"}
    assert "the reply of c is left out: no answer within the round's deadline of 30 s" in caplog.text
    assert clock.now == 1030.0 and not strategy.history[1].skipped


@pytest.mark.parametrize("streaming", [False, True])
def test_enough_good_replies_end_the_round(clock: Clock, streaming: bool) -> None:
    strategy = fedavg(streaming=streaming, quorum=2)
    after = run(strategy, grid(clock, {A: 100.0, B: 1.0, C: 5.0}))
    assert shift(after) == 3.0  # of b and c
    assert reasons(strategy) == {"a": "the round had its quorum of 2 good replies"}
    assert clock.now == 1006.0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_reply_is_not_one_of_the_quorum(clock: Clock, streaming: bool) -> None:
    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train" and reply.content["config"]["client"] == "b":
            reply.content["metrics"]["num-examples"] = 0
        return reply

    strategy = fedavg(streaming=streaming, quorum=2)
    after = run(strategy, grid(clock, {A: 10.0, B: 1.0, C: 5.0}, tamper))
    assert shift(after) == 2.5  # of a and c
    assert reasons(strategy).keys() == {"b"} and "must be above 0" in reasons(strategy)["b"]


def test_a_quorum_that_just_all_of_them_make_leaves_nobody_out(clock: Clock) -> None:
    strategy = fedavg(quorum=3)
    assert shift(run(strategy, grid(clock, {A: 1.0, B: 7.0, C: 5.0}))) == pytest.approx(7 / 3)
    assert not strategy.history[1].dropped


@pytest.mark.parametrize("streaming", [False, True])
def test_a_late_reply_is_not_taken_for_one_of_the_next_round(clock: Clock, streaming: bool) -> None:
    """C's reply to round 1 is there at 12 s, after that round's end at 10 s and before C's reply to round 2 at 15 s."""
    late = grid(clock, {})
    late.seconds = lambda m: {1: 12.0, 2: 5.0}[m.content["config"]["server-round"]] * (m.metadata.dst_node_id == C)
    # in round 2 each site adds ten times as much, so that a reply to round 1 would show
    late.client = Adder(lambda node, r: SHIFTS[node["index"]] * (1, 10)[r - 1])
    strategy = fedavg(streaming=streaming, round_deadline=10.0)
    assert shift(run(strategy, late, 2)) == pytest.approx(1.5 + 70 / 3)
    assert reasons(strategy) == {"c": "no answer within the round's deadline of 10 s"}
    assert not reasons(strategy, 2) and len(late.pushed) == 1  # the late one was never fetched


def test_evaluation_has_the_same_limits(clock: Clock) -> None:
    every = grid(clock, dict.fromkeys((A, B, C), 0.0))
    every.seconds = lambda m: {"train": 0.0, "evaluate": {A: 0.0, B: 20.0, C: 99.0}[m.metadata.dst_node_id]}.get(
        m.metadata.message_type, 0.0
    )
    strategy = fedavg(1.0, round_deadline=50.0)
    run(strategy, every)
    assert reasons(strategy) == {"c": "evaluation: no answer within the round's deadline of 50 s"}
    assert [name for name, metrics in strategy.history[1].clients.items() if "evaluate_loss" in metrics] == ["a", "b"]
    strategy = fedavg(1.0, quorum=2)
    every.seconds = lambda m: 99.0 if m.metadata.dst_node_id == B else 0.0
    run(strategy, every)
    assert reasons(strategy)["b"] == "evaluation: the round had its quorum of 2 good replies"


def test_all_too_late_leaves_the_adapter_and_the_run_goes_on(clock: Clock) -> None:
    strategy = fedavg(streaming=True, round_deadline=5.0)
    after = run(strategy, grid(clock, dict.fromkeys((A, B, C), math.inf)), 2)
    assert all(torch.equal(after[name], FIRST[name]) for name in FIRST)
    assert [record.skipped for record in strategy.history] == [False, True, True]
    assert strategy.history[1].dropped[-1].reason == "0 good replies, 1 are needed"


def test_without_a_deadline_the_timeout_of_start_holds(clock: Clock) -> None:
    strategy = fedavg(quorum=3)
    run(strategy, grid(clock, {A: 0.0, B: 0.0, C: math.inf}), timeout=60.0)
    assert reasons(strategy) == {"c": "no answer in time"} and clock.now == 1060.0


def test_a_node_that_went_away_is_not_waited_for(clock: Clock) -> None:
    """Flower answers for it, as node 1 and with error 5."""

    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type != "train" or reply.content["config"]["client"] != "b":
            return reply
        reply.metadata.__dict__["_src_node_id"] = 1
        return Message(error=Error(5, "Node Unavailable"), metadata=reply.metadata)  # type: ignore[call-overload]

    strategy = fedavg(streaming=True)
    assert shift(run(strategy, grid(clock, {A: 0.0, B: 4.0, C: 0.0}, tamper))) == 2.5
    assert reasons(strategy) == {"b": "error 5: Node Unavailable"} and clock.now == 1006.0


def test_limits_that_make_no_sense_are_refused() -> None:
    for deadline in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="round-deadline must be seconds above 0"):
            fedavg(round_deadline=deadline)
    with pytest.raises(ConfigError, match="quorum must be at least 1"):
        fedavg(quorum=0)
    with pytest.raises(ConfigError, match="a quorum of 2 is less than min-results 3"):
        fedavg(quorum=2, min_results=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round_deadline": 5.0}, "round-deadline was None and is 5.0"),
        ({"quorum": 2}, "quorum was None and is 2"),
        ({"streaming": True}, "streaming was False and is True"),
    ],
)
def test_they_must_be_the_same_on_resume(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(fedavg(run_dir=tmp_path), FakeGrid(Adder(lambda n, r: 1.0), sites(3)))
    with pytest.raises(CheckpointError, match=message):
        run(fedavg(run_dir=tmp_path, resume=True, **change), FakeGrid(Adder(lambda n, r: 1.0), sites(3)), 2)
