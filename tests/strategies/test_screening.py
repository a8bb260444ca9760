"""Each kind of bad reply is left out with its reason, alone, while the rest of the round counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from offsite_fl.wire import names
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap

Spoil = Callable[[Message], "Message | list[Message] | None"]


def with_array(name: str, value: np.ndarray) -> Spoil:
    def spoil(reply: Message) -> Message:
        reply.content["arrays"][name] = Array(value)
        return reply

    return spoil


def with_metric(name: str, value: object) -> Spoil:
    def spoil(reply: Message) -> Message:
        reply.content["metrics"][name] = value
        return reply

    return spoil


def edit(change: Callable[[RecordDict], object]) -> Spoil:
    def spoil(reply: Message) -> Message:
        change(reply.content)
        return reply

    return spoil


def instead(reply: Message, error: Error) -> Message:
    """The error that a node sends instead of its reply."""
    return Message(error=error, metadata=reply.metadata)  # type: ignore[call-overload]


def damaged(content: RecordDict) -> None:
    array = content["arrays"]["adapter.1.b"]
    content["arrays"]["adapter.1.b"] = Array(array.dtype, tuple(array.shape), array.stype, b"?" * len(array.data))


CASES: dict[str, tuple[Spoil, str]] = {
    "NaN": (with_array("adapter.1.b", np.array([np.nan], np.float32)), "'adapter.1.b' has values that aren't finite"),
    "infinite": (with_array("adapter.1.b", np.array([np.inf], np.float32)), "aren't finite"),
    "wrong shape": (with_array("adapter.1.b", np.zeros(2, np.float32)), "'adapter.1.b' has shape (2,), expected (1,)"),
    "int dtype": (with_array("adapter.1.b", np.zeros(1, np.int64)), "has dtype 'int64', expected float32"),
    "float64": (with_array("adapter.1.b", np.zeros(1)), "has dtype 'float64', expected float32"),
    "extra": (with_array("adapter.9.x", np.zeros(1, np.float32)), "1 unknown tensor: 'adapter.9.x'"),
    "missing": (edit(lambda c: c["arrays"].pop("adapter.1.b")), "1 missing tensor: 'adapter.1.b'"),
    "damaged": (edit(damaged), "damaged bytes"),
    "foreign codec": (edit(lambda c: c["config"].__setitem__("wire.codec", "int8")), "came as codec 'int8'"),
    "other bundle": (edit(lambda c: c["config"].__setitem__("bundle.digest", "e" * 64)), "tuned another bundle"),
    "two array records": (edit(lambda c: c.__setitem__("b", ArrayRecord())), "exactly one ArrayRecord, found 2"),
    "no metrics": (edit(lambda c: c.pop("metrics")), "exactly one MetricRecord, found 0"),
    "no examples": (edit(lambda c: c["metrics"].pop("num-examples")), "metric 'num-examples' is missing"),
    "negative examples": (with_metric("num-examples", -5), "'num-examples' is -5, must be above 0"),
    "zero examples": (with_metric("num-examples", 0), "must be above 0"),
    "all the weight": (with_metric("num-examples", 10**18), "must be above 0 and at most 1e+12"),
    "weights that overflow": (with_metric("num-examples", 1e308), "must be above 0 and at most 1e+12"),
    "NaN examples": (with_metric("num-examples", float("nan")), "must be one finite number"),
    "list of examples": (with_metric("num-examples", [1, 2]), "must be one finite number"),
    "NaN loss": (with_metric("train_loss", float("nan")), "metric 'train_loss' is nan"),
    "missing loss": (
        edit(lambda c: c["metrics"].pop("train_loss")),
        "'train_loss' is missing, which the other replies",
    ),
    "far away": (with_array("adapter.1.b", np.array([1e6], np.float32)), "norm is 1e+06, the bound is 50"),
    "error": (lambda r: instead(r, Error(2, "<class 'X'>:<'boom'>")), "error 2: <class 'X'>:<'boom'>"),
    "refusal": (lambda r: instead(r, Error(names.REFUSED, "DataError: no data")), "DataError: no data"),
    "silence": (lambda r: None, "no answer in time"),
    "stranger": (lambda r: _from(r, 77), "answered without being asked"),
    "twice": (lambda r: [r, r], "answered twice; the first answer counts"),
}


def _from(reply: Message, node: int) -> Message:
    reply.metadata.__dict__.update(_src_node_id=node, _reply_to_message_id="x")
    return reply


@pytest.mark.parametrize("case", CASES)
def test_a_bad_reply_is_dropped_with_its_reason_and_the_others_count(case: str) -> None:
    spoil, reason = CASES[case]

    def tamper(reply: Message) -> Message | list[Message] | None:
        bad = reply.metadata.message_type == "train" and reply.content["config"].get("client") == "b"
        return spoil(reply) if bad else reply

    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(3)), max_update_norm=50.0)
    grid = FakeGrid(Adder(lambda node, r: [1.0, 2.0, 4.0][node["index"]]), sites(3), tamper)
    after = run(strategy, grid)
    shift = 7 / 3 if case == "twice" else 2.5
    assert torch.allclose(after["adapter.1.b"], FIRST["adapter.1.b"] + shift)
    reasons = [dropped.reason for dropped in strategy.history[1].dropped]
    assert any(reason in found for found in reasons), reasons
    assert not strategy.history[1].skipped


def test_flower_answers_for_a_node_that_went_away() -> None:
    """Error 5 comes from node 1, the SuperLink; the reason must be booked to the node that is gone."""

    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type != "train" or reply.content["config"].get("client") != "b":
            return reply
        reply.metadata.__dict__["_src_node_id"] = 1
        return instead(reply, Error(5, "failed to report a heartbeat"))

    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(2)))
    run(strategy, FakeGrid(Adder(lambda n, r: 1.0), sites(2), tamper))
    (dropped,) = strategy.history[1].dropped
    assert dropped.node == "b" and "heartbeat" in dropped.reason


def test_all_replies_bad_leaves_the_adapter_and_the_run_goes_on() -> None:
    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train" and len(strategy.history) == 2:  # round 1 only
            return CASES["NaN"][0](reply)  # type: ignore[return-value]
        return reply

    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(2)))
    after = run(strategy, FakeGrid(Adder(lambda n, r: 1.0), sites(2), tamper), 2)
    assert [record.skipped for record in strategy.history] == [False, True, False]
    assert torch.equal(after["adapter.1.b"], FIRST["adapter.1.b"] + 1)


def test_a_metric_that_few_report_is_left_out_of_those() -> None:
    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train" and reply.content["config"].get("client") == "b":
            reply.content["metrics"]["temperature"] = 20.0
        return reply

    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(3)))
    result = strategy.start(FakeGrid(Adder(lambda n, r: 1.0), sites(3), tamper), num_rounds=1)
    assert set(result.train_metrics_clientapp[1]) == {"train_loss"}
    assert not strategy.history[1].dropped


def test_replies_of_a_foreign_client_app_without_a_config_record() -> None:
    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            del reply.content["config"]
        return reply

    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(2)))
    after = run(strategy, FakeGrid(Adder(lambda n, r: 1.0), sites(2), tamper))
    assert torch.equal(after["adapter.1.b"], FIRST["adapter.1.b"] + 1)


def test_the_norm_bound_is_over_all_tensors() -> None:
    # 4 + 1 values, each moved by 2: the norm is 2 * sqrt(5) = 4.47
    for bound, skipped in ((4.4, True), (4.5, False)):
        strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(1)), max_update_norm=bound)
        run(strategy, FakeGrid(Adder(lambda n, r: 2.0), sites(1)))
        assert strategy.history[1].skipped is skipped


def test_names_of_sites_are_labels_only() -> None:
    """A hostile or repeated name neither breaks the log nor merges two sites."""
    nodes = {1: {"name": "a\n\x1b[31mFAKE"}, 2: {"name": "twin"}, 3: {"name": "twin"}}
    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(3)))
    run(strategy, FakeGrid(Adder(lambda n, r: 1.0), nodes))
    clients = strategy.history[1].clients
    assert set(clients) == {"a [31mFAKE", "twin", "twin (node 3)"}


def test_messages_that_are_no_messages() -> None:
    """Whatever raises while a reply is read is that reply's fault."""

    strategy = wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offsite_fl.strategies.screening.only_arrays", lambda content: 1 / 0)
        run(strategy, FakeGrid(Adder(lambda n, r: 1.0), sites(1)))
    assert "malformed reply (ZeroDivisionError" in strategy.history[1].dropped[0].reason
