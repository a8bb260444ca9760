"""The mean folded in reply by reply is that of all replies at once, in every strategy that is a function of it."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.errors import ConfigError
from offsite_fl.strategies import Ditto, FedPer, FFALoRA, FLoRA, OffsiteTuning, RoLoRA, snapshot
from offsite_fl.strategies.outgoing import Form
from offsite_fl.strategies.streaming import StreamingMean, step
from offsite_fl.wire.codecs import encode
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap

SITES = 5
WEIGHTS = [3, 1, 4, 1, 5]
COMMON = {**all_nodes(SITES), "fraction_evaluate": 0.0}
BASES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: flower.FedAvg(**COMMON),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1, **COMMON),
    "FedAvgM": lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9, **COMMON),
    "FedAdam": lambda: flower.FedAdam(**COMMON),
    "FedAdagrad": lambda: flower.FedAdagrad(**COMMON),
    "FedYogi": lambda: flower.FedYogi(**COMMON),
}
ULP = 2.0**-23  # of fp32, relative


def shifts(node: dict[str, Any], server_round: int) -> float:
    return float(np.random.default_rng([node["index"], server_round]).normal(1.0, 0.2))


def grid(tamper: Any = None, reference: dict[str, torch.Tensor] | None = None, count: int = SITES) -> FakeGrid:
    return FakeGrid(Adder(shifts, reference=reference), sites(count, WEIGHTS[:count]), tamper)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], ulps: float) -> bool:
    return all(torch.allclose(one[n].double(), other[n].double(), rtol=ulps * ULP, atol=0) for n in FIRST)


def only(strategy: OffsiteTuning, server_round: int = 1) -> str:
    (dropped,) = strategy.history[server_round].dropped
    return f"{dropped.node}: {dropped.reason}"


# The mean --------------------------------------------------------------------------------------------------------


def replies(count: int, seed: int = 0) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Values over ten orders of magnitude, with whole and with broken weights."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        values = rng.normal(size=6) * 10.0 ** rng.integers(-5, 6, size=6)
        tensors = {"a": torch.tensor(values[:4].reshape(2, 2)).float(), "b": torch.tensor(values[4:]).float()}
        made.append((tensors, float(rng.integers(1, 10**6)) if index % 2 else float(rng.uniform(0.1, 3.0))))
    return made


def folded(parts: Iterable[tuple[dict[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    mean = StreamingMean()
    for tensors, weight in parts:
        mean.add(tensors, weight)
    return mean.take()


def test_the_mean_against_fractions() -> None:
    parts = replies(9)
    found = folded(parts)
    total = sum(Fraction(weight) for _, weight in parts)
    for name in ("a", "b"):
        for place, value in enumerate(found[name].flatten().tolist()):
            terms = [Fraction(weight) * Fraction(t[name].flatten()[place].item()) for t, weight in parts]
            exact, size = sum(terms) / total, sum(map(abs, terms)) / total
            # half a unit in the last place of fp32, and fp64 sums
            assert abs(Fraction(value) - exact) <= abs(exact) * Fraction(ULP) / 2 + size / 2**48
    assert all(tensor.dtype == torch.float32 for tensor in found.values()) and found["a"].shape == (2, 2)


def test_the_order_of_replies_changes_nothing() -> None:
    parts = replies(12, seed=1)
    first = folded(parts)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(12)
        other = folded([parts[i] for i in order])
        assert all(torch.allclose(first[name], other[name], rtol=ULP, atol=0) for name in first)


def test_one_reply_s_mean_is_that_reply() -> None:
    tensors = replies(1)[0][0]
    for weight in (1.0, 3.0, 7.0, 1e12):
        assert all(torch.equal(tensors[name], value) for name, value in folded([(tensors, weight)]).items())


def test_large_values_and_weights_don_t_overflow() -> None:
    big = {"a": torch.tensor([3e38, -3e38])}
    assert folded([(big, 1e12)] * 4)["a"].tolist() == big["a"].tolist()


# Whole rounds against the batch form -----------------------------------------------------------------------------


def test_by_hand() -> None:
    # examples 1, 1, 2 and shifts 1, 2, 3: the mean shift is (1 + 2 + 6) / 4 = 2.25
    strategy = wrap(FedAvg(**all_nodes(3)), streaming=True)
    after = run(strategy, FakeGrid(Adder(lambda node, r: node["index"] + 1.0), sites(3, [1, 1, 2])))
    assert after["adapter.0.w"].tolist() == [[3.25, 4.25], [5.25, 6.25]]
    assert strategy.update().num_examples == 4
    assert strategy.history[1].clients["c"]["num-examples"] == 2


@pytest.mark.parametrize("name", BASES)
def test_each_strategy_is_as_with_all_replies_at_once(name: str) -> None:
    batch, streamed = wrap(BASES[name]()), wrap(BASES[name](), streaming=True)
    expected, found = batch.start(grid(), num_rounds=3), streamed.start(grid(), num_rounds=3)
    one, other = ({n: torch.from_numpy(a.numpy().copy()) for n, a in r.arrays.items()} for r in (expected, found))
    # Five products and sums in fp32 on the one side, a round; adaptive steps divide by roots of small differences
    assert close(one, other, 3 * 16 if name in ("FedAvg", "FedProx", "FedAvgM") else 3 * 64)
    assert not close(one, FIRST, 1e5)
    assert not any(record.skipped or record.dropped for record in streamed.history)
    assert [r.clients for r in streamed.history] == [r.clients for r in batch.history]
    for server_round, metrics in expected.train_metrics_clientapp.items():
        assert dict(found.train_metrics_clientapp[server_round]) == pytest.approx(dict(metrics))
    (table, moments), (like, wanted) = snapshot.take(streamed.base), snapshot.take(batch.base)
    assert moments.keys() == wanted.keys() and table.keys() == like.keys()
    for key in moments:  # momentum and moments are sums of differences of values near 1 to 8
        assert np.allclose(moments[key], wanted[key], rtol=1e-4, atol=64 * ULP), key


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_every_codec(codec: str) -> None:
    one = run(wrap(BASES["FedAvg"](), codec=codec), grid(reference=dict(FIRST)), 2)
    other = run(wrap(BASES["FedAvg"](), codec=codec, streaming=True), grid(reference=dict(FIRST)), 2)
    # the next round's encoding may turn one unit in the last place of fp32 into one of the codec
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=8 * 2**-8) for name in FIRST)


def test_replies_of_one_site_are_that_site() -> None:
    client = Adder(lambda node, r: 0.25)
    after = run(wrap(FedAvg(**all_nodes(1)), streaming=True), FakeGrid(client, sites(1, [3])), 2)
    assert all(torch.equal(after[name], FIRST[name] + 0.5) for name in FIRST)


def test_bad_replies_in_between_are_left_out() -> None:
    def tamper(reply: Message) -> Message | list[Message]:
        if reply.metadata.message_type != "train":
            return reply
        client, arrays = reply.content["config"]["client"], reply.content["arrays"]
        if client == "b":
            arrays["adapter.1.b"] = Array(np.array([np.nan], np.float32))
        if client == "d":
            arrays["adapter.1.b"] = Array(np.array([1e6], np.float32))
        if client == "e":
            reply.content["metrics"]["num-examples"] = float("inf")
        return [reply, reply] if client == "a" else reply

    strategy = wrap(BASES["FedAvg"](), streaming=True, max_update_norm=50.0)
    after = run(strategy, grid(tamper))
    a, c = shifts({"index": 0}, 1), shifts({"index": 2}, 1)  # examples 3 and 4
    assert after["adapter.1.b"].item() == pytest.approx(0.5 + (3 * a + 4 * c) / 7)
    reasons = {dropped.node: dropped.reason for dropped in strategy.history[1].dropped}
    assert "aren't finite" in reasons["b"] and "the bound is 50" in reasons["d"] and "one finite number" in reasons["e"]
    assert "answered twice" in reasons["a"] and set(strategy.history[1].clients) == {"a", "c"}


def test_updates_are_scaled_down_one_by_one() -> None:
    options = {"clip_update_norm": 2.0}
    batch, streamed = wrap(BASES["FedAvg"](), **options), wrap(BASES["FedAvg"](), streaming=True, **options)
    assert close(run(batch, grid()), run(streamed, grid()), 16)
    assert 0 < streamed.history[1].clipped == batch.history[1].clipped


def test_too_few_good_replies_leave_the_adapter() -> None:
    def tamper(reply: Message) -> Message | None:
        silent = reply.metadata.message_type == "train" and reply.content["config"]["client"] != "a"
        return None if silent else reply

    strategy = wrap(BASES["FedAdam"](), streaming=True, min_results=2, round_deadline=0.01)
    after = run(strategy, grid(tamper))
    assert all(torch.equal(after[name], FIRST[name]) for name in FIRST) and strategy.history[1].skipped


def test_around_and_inside_privacy_wrappers() -> None:
    """Inside, a wrapper needs all replies and is refused; outside, it hands over replies that it has clipped."""
    results = []
    for streaming in (False, True):
        inner = wrap(FedAvg(**COMMON), streaming=streaming)
        outer = flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 0.5, SITES)
        arrays = outer.start(grid(), inner.initial_arrays(), num_rounds=2).arrays
        results.append({name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()})
    assert close(*results, 64) and not close(results[0], FIRST, 1e5)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="DifferentialPrivacyServerSideFixedClipping needs all replies"):
        wrap(flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(**COMMON), 0.0, 0.5, SITES), streaming=True)


# Metrics ---------------------------------------------------------------------------------------------------------


def with_metrics(change: Callable[[str, MetricRecord], object]) -> Callable[[Message], Message]:
    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            change(str(reply.content["config"]["client"]), reply.content["metrics"])
        return reply

    return tamper


def test_metrics_are_averaged_over_all_replies_by_weight() -> None:
    def change(client: str, metrics: MetricRecord) -> None:
        metrics["train_loss"] = {"a": 1.0, "b": 2.0, "c": 6.0}[client]

    strategy = wrap(FedAvg(**all_nodes(3)), streaming=True)
    result = strategy.start(grid(with_metrics(change), count=3), num_rounds=1)
    assert dict(result.train_metrics_clientapp[1]) == {"train_loss": pytest.approx((3 * 1 + 1 * 2 + 4 * 6) / 8)}


def test_a_reply_without_a_metric_that_most_have_counts_and_its_metrics_don_t() -> None:
    """Its adapter was folded in before anybody could know what most have; the batch form drops such a reply."""

    def change(client: str, metrics: MetricRecord) -> None:
        metrics["train_loss"] = {"a": 1.0, "b": 2.0, "c": 6.0}[client]
        metrics["heat" if client == "a" else "extra"] = 1.0
        if client == "b":
            del metrics["train_loss"], metrics["extra"]

    strategy = wrap(FedAvg(**all_nodes(3)), streaming=True)
    result = strategy.start(grid(with_metrics(change), count=3), num_rounds=1)
    assert not strategy.history[1].dropped
    shift = sum(w * shifts({"index": i}, 1) for i, w in enumerate([3, 1, 4])) / 8
    assert float(result.arrays["adapter.1.b"].numpy()[0]) == pytest.approx(0.5 + shift)
    assert dict(result.train_metrics_clientapp[1]) == {"train_loss": pytest.approx((3 * 1 + 4 * 6) / 7)}
    assert set(strategy.history[1].clients["b"]) == {"num-examples", "evaluate_num-examples", "evaluate_loss"}


def test_where_no_reply_has_all_metrics_the_mean_counts_all_the_same() -> None:
    lacks = {"a": "x", "b": "y", "c": "z"}

    def change(client: str, metrics: MetricRecord) -> None:
        del metrics["train_loss"]
        for name in set(lacks.values()) - {lacks[client]}:
            metrics[name] = 1.0

    strategy = wrap(FedAvg(**all_nodes(3)), streaming=True)
    result = strategy.start(grid(with_metrics(change), count=3), num_rounds=1)
    assert not strategy.history[1].skipped and not dict(result.train_metrics_clientapp[1])


def test_a_function_of_one_s_own_for_metrics_sees_those_of_all_once_and_no_arrays() -> None:
    seen: list[list[RecordDict]] = []

    def worst(records: list[RecordDict], key: str) -> MetricRecord:
        seen.append(records)
        return MetricRecord({"most": max(float(r["metrics"][key]) for r in records)})  # type: ignore[arg-type, index]

    base = FedAvg(train_metrics_aggr_fn=worst, **COMMON)
    result = wrap(base, streaming=True).start(grid(), num_rounds=2)
    assert [len(records) for records in seen] == [SITES, SITES]
    assert not any(record.array_records for records in seen for record in records)
    assert dict(result.train_metrics_clientapp[2]) == {"most": 5.0} and base.train_metrics_aggr_fn is worst


def test_a_strategy_that_raises_leaves_the_adapter_and_its_own_state() -> None:
    class Sick(FedAvg):
        of_mean = True
        seen = 0

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self.seen += 1
            if server_round == 1:
                raise ZeroDivisionError("no clients")
            return super().aggregate_train(server_round, replies)

    base = Sick(**COMMON)
    own = base.train_metrics_aggr_fn
    strategy = wrap(base, streaming=True)
    run(strategy, grid(), 2)
    assert [record.skipped for record in strategy.history] == [False, True, False]
    assert base.seen == 1 and base.train_metrics_aggr_fn is own
    assert only(strategy) == "aggregate: Sick couldn't aggregate: no clients"


# Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam"])
def test_resumed_rounds_equal_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    random.seed(5)  # for the order in which Flower asks, and so in which replies come
    whole = run(wrap(BASES[name](), streaming=True, run_dir=tmp_path / "whole"), grid(), 4)
    random.seed(5)
    run(wrap(BASES[name](), streaming=True, run_dir=tmp_path / "parts"), grid(), 2)
    parts = run(wrap(BASES[name](), streaming=True, run_dir=tmp_path / "parts", resume=True), grid(), 4)
    assert all(torch.equal(whole[name], parts[name]) for name in FIRST)


def one_reply(tensors: dict[str, torch.Tensor], weight: float) -> Message:
    metrics = MetricRecord({"num-examples": weight, "train_loss": weight / 2})
    return Message(RecordDict({"arrays": encode(tensors, tensors)[0], "metrics": metrics}), 1, "train")


@pytest.mark.parametrize("make", [Ditto, FedPer, FFALoRA, FLoRA, RoLoRA])
def test_our_own_take_the_same_step(make: Callable[[], Strategy]) -> None:
    parts = [({"adapter.0.a": t["a"], "adapter.1.b": t["b"]}, w) for t, w in replies(4, seed=3)]
    base = make()
    if isinstance(base, FedPer):  # the personal block doesn't travel
        base.whole = ArrayRecord({"adapter.0.a": Array(np.ones((2, 2))), "adapter.1.b": Array(np.full(2, 7.0))})
        parts = [({"adapter.0.a": tensors["adapter.0.a"]}, weight) for tensors, weight in parts]
    expected, wanted = base.aggregate_train(1, [one_reply(*part) for part in parts])
    mean = StreamingMean()
    for part in parts:
        mean.add(*part)
    found, metrics = step(base, 1, mean, without_arrays(parts), "num-examples")
    assert expected is not None and found is not None and expected.keys() == found.keys()
    largest = max(float(tensor.abs().max()) for tensors, _ in parts for tensor in tensors.values())
    assert all(np.allclose(expected[n].numpy(), found[n].numpy(), rtol=0, atol=16 * ULP * largest) for n in expected)
    assert dict(metrics or {}) == pytest.approx(dict(wanted or {}))


def without_arrays(parts: Sequence[tuple[dict[str, torch.Tensor], float]]) -> list[Message]:
    made = [one_reply(*part) for part in parts]
    for message in made:
        del message.content["arrays"]
    return made


# Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quorum", [None, 30])
def test_as_few_replies_are_alive_as_there_are_steps(monkeypatch: pytest.MonkeyPatch, quorum: int | None) -> None:
    """Of forty replies one is on its way and one is folded in; with all at once, forty are there."""

    def most_alive(**options: Any) -> tuple[int, int]:
        raw: list[weakref.ref[Any]] = []
        decoded: list[weakref.ref[Any]] = []
        most = [0, 0]
        read, adder = Form.read, Adder(shifts)

        def watched(form: Form, *arguments: Any) -> dict[str, torch.Tensor]:
            tensors = read(form, *arguments)
            decoded.append(weakref.ref(tensors["adapter.0.w"]))
            most[1] = max(most[1], sum(ref() is not None for ref in decoded))
            return tensors

        def client(message: Message, context: Context) -> Message:
            return adder(message, context)

        def tamper(reply: Message) -> Message:
            if reply.metadata.message_type == "train":
                raw.append(weakref.ref(reply.content["arrays"]["adapter.0.w"]))
                most[0] = max(most[0], sum(ref() is not None for ref in raw))
            return reply

        monkeypatch.setattr(Form, "read", watched)
        gc.collect()
        gc.disable()  # nothing may wait for the collector
        try:
            base = FedAvg(**{**all_nodes(40), "fraction_evaluate": 0.0})
            run(wrap(base, **options), FakeGrid(client, sites(40), tamper))
        finally:
            gc.enable()
            monkeypatch.setattr(Form, "read", read)
        return most[0], most[1]

    assert most_alive(streaming=True, quorum=quorum) == (1, 1)
    assert max(most_alive()) == 40
