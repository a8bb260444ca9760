"""The wrapper by hand: averages, names, order of replies, delivery once, and rounds that fail."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, FedMedian, FedProx

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError, WireError
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, StubOwner, run, sites, wrap


def by_index(node: dict, server_round: int) -> float:
    """Site a adds 1, b adds 2, ..."""
    return node["index"] + 1.0


def test_fedavg_by_hand() -> None:
    # examples 1, 1, 2 and shifts 1, 2, 3: the mean shift is (1 + 2 + 6) / 4 = 2.25
    strategy = wrap(FedAvg(**all_nodes(3)))
    after = run(strategy, FakeGrid(Adder(by_index), sites(3, [1, 1, 2])))
    assert after["adapter.0.w"].tolist() == [[3.25, 4.25], [5.25, 6.25]]
    assert after["adapter.1.b"].tolist() == [2.75]
    assert strategy.history[1].clients["c"]["num-examples"] == 2
    assert torch.equal(strategy.update().tensors["adapter.1.b"], after["adapter.1.b"])
    assert strategy.update().num_examples == 4


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8"])
def test_one_client_s_average_is_that_client(codec: str) -> None:
    strategy = wrap(FedAvg(**all_nodes(1)), codec=codec)
    client = Adder(lambda n, r: 0.25, reference=dict(FIRST) if codec == "int8" else None)
    after = run(strategy, FakeGrid(client, sites(1)), 2)
    # halves and quarters are exact in the short floats; int8 is exact too, for all differences of a tensor are equal
    assert torch.allclose(after["adapter.0.w"], FIRST["adapter.0.w"] + 0.5, rtol=0, atol=1e-6 * (codec == "int8"))


def test_the_order_of_nodes_and_replies_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    shifts = rng.normal(size=5) * 10.0 ** rng.integers(-3, 4, size=5)

    def after(order: list[int]) -> dict[str, torch.Tensor]:
        all_sites = list(sites(5, [3, 1, 4, 1, 5], first=100 * sum(order[:2])).items())
        nodes = dict(all_sites[i] for i in order)
        random.seed(sum(order[:3]))  # Flower samples, and so asks, in another order each time
        return run(wrap(FedAvg(**all_nodes(5))), FakeGrid(Adder(lambda n, r: float(shifts[n["index"]])), nodes))

    results = [after(rng.permutation(5).tolist()) for _ in range(6)]
    # bit for bit: replies are sorted by the sites' own names
    assert all(torch.equal(results[0][name], other[name]) for other in results for name in FIRST)


def test_every_contribution_counts() -> None:
    without = [
        run(wrap(FedAvg(**all_nodes(3))), FakeGrid(Adder(by_index), sites(3, w))) for w in ([1, 1, 1], [1, 1, 9])
    ]
    assert not torch.equal(without[0]["adapter.1.b"], without[1]["adapter.1.b"])


def test_aggregation_is_in_fp32_whatever_travels() -> None:
    # fp16 carries 999.5 and 1000.5 exactly; their weighted mean 1000.1667 it doesn't (its spacing there is 0.5), so
    # Flower's own average of such replies, which stays in fp16, gives 1000.
    client = Adder(lambda node, r: 999.0 + node["index"])
    after = run(wrap(FedAvg(**all_nodes(2)), codec="fp16"), FakeGrid(client, sites(2, [1, 2])))
    assert after["adapter.1.b"].dtype == torch.float32
    assert abs(float(after["adapter.1.b"]) - (999.5 + 2 * 1000.5) / 3) < 1e-4


def test_messages_are_separate_and_carry_the_settings() -> None:
    seen: list[ConfigRecord] = []

    def client(message, context):  # type: ignore[no-untyped-def]
        if message.metadata.message_type == "train":
            seen.append(message.content["config"])
        return Adder(by_index)(message, context)

    tune = TuneConfig(lr=0.5, max_steps=3, schedule_steps=9)
    strategy = wrap(FedProx(proximal_mu=0.125, **all_nodes(2)), tune=tune)
    run(strategy, FakeGrid(client, sites(2)), 2, train_config=ConfigRecord({"tune.lr": 0.25, "mine": 1}))
    assert [c["server-round"] for c in seen] == [1, 1, 2, 2]
    assert [c["tune.schedule-offset"] for c in seen] == [0, 0, 3, 3]
    assert all(c["tune.lr"] == 0.25 and c["mine"] == 1 and c["proximal-mu"] == 0.125 for c in seen)
    assert all(c["bundle.digest"] == "d" * 64 and c["wire.codec"] == "fp32" for c in seen)
    assert "tune.device" not in seen[0]  # None: Flower's counters can't count empty text


def test_settings_are_checked_when_made() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        wrap(FedAvg(), codec="int88")
    with pytest.raises(ConfigError, match="min-results"):
        wrap(FedAvg(), min_results=0)
    with pytest.raises(ConfigError, match="resume needs a run folder"):
        wrap(FedAvg(), resume=True)
    with pytest.raises(ConfigError, match="there is no bundle"):
        from offsite_fl.strategies import OffsiteTuning

        OffsiteTuning(FedAvg(), StubOwner(bundle=None))  # type: ignore[arg-type]
    strategy = wrap(FedAvg(**all_nodes(1)))
    with pytest.raises(ConfigError, match="LoRA settings can't change"):
        run(strategy, FakeGrid(Adder(by_index), sites(1)), train_config=ConfigRecord({"tune.lora-rank": 4}))
    with pytest.raises(WireError, match="1 missing tensor"):
        strategy.tensors_of(ArrayRecord({"adapter.1.b": FIRST["adapter.1.b"]}))


def test_too_few_good_replies_leave_the_adapter_and_the_run_goes_on() -> None:
    def tamper(reply):  # type: ignore[no-untyped-def]
        if reply.metadata.message_type == "train" and reply.content["config"]["client"] == "b":
            return None
        return reply

    strategy = wrap(FedAvg(**all_nodes(2)), min_results=2)
    after = run(strategy, FakeGrid(Adder(by_index), sites(2), tamper), 2)
    assert all(torch.equal(after[name], FIRST[name]) for name in FIRST)
    assert [record.skipped for record in strategy.history] == [False, True, True]
    assert ("b", "no answer in time") in [(d.node, d.reason) for d in strategy.history[1].dropped]
    assert "1 good replies, 2 are needed" in strategy.history[1].dropped[-1].reason


def test_a_strategy_that_raises_or_gives_nonsense_leaves_the_adapter_and_its_own_state() -> None:
    class Sick(FedAvg):
        seen = 0

        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            self.seen += 1
            if server_round == 1:
                raise ZeroDivisionError("no clients")
            arrays, metrics = super().aggregate_train(server_round, replies)
            broken = {
                2: None,
                3: ArrayRecord({"x": torch.zeros(1)}),
                4: ArrayRecord({k: torch.full(v.shape, torch.nan) for k, v in FIRST.items()}),
            }
            return broken.get(server_round, arrays), metrics

    base = Sick(**all_nodes(1))
    strategy = wrap(base)
    after = run(strategy, FakeGrid(Adder(by_index), sites(1)), 5)
    reasons = [record.dropped[-1].reason for record in strategy.history[1:5]]
    for reason, part in zip(reasons, ("no clients", "no arrays", "lacks 2 tensors", "aren't finite"), strict=True):
        assert part in reason
    assert base.seen == 1  # rounds 1 to 4 were undone
    assert after["adapter.1.b"].tolist() == [1.5]  # only round 5 counts


def test_aggregates_of_another_dtype_come_back_as_fp32() -> None:
    class Double(FedMedian):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            arrays, metrics = super().aggregate_train(server_round, replies)
            return ArrayRecord({k: torch.from_numpy(a.numpy().astype(np.float64)) for k, a in arrays.items()}), metrics

    after = run(wrap(Double(**all_nodes(3))), FakeGrid(Adder(by_index), sites(3)))
    assert after["adapter.1.b"].dtype == torch.float32 and after["adapter.1.b"].tolist() == [2.5]


def test_evaluation_on_clients_and_on_the_server() -> None:
    seen: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        seen.append(server_round)
        arrays.clear()  # foreign code may take the record apart
        return MetricRecord({"plug_in_loss": 2.0 - server_round, "emulator_loss": 3.0, "x": 1})

    strategy = wrap(FedAvg(**all_nodes(2)))
    result = strategy.start(FakeGrid(Adder(by_index), sites(2)), num_rounds=2, evaluate_fn=evaluate)
    assert seen == [0, 1, 2]
    assert strategy.history[2].plug_in is not None and strategy.history[2].plug_in.loss == 0.0
    assert result.evaluate_metrics_clientapp[1]["loss"] == 1.0
    assert strategy.history[1].clients["a"]["evaluate_loss"] == 1.0
    assert result.arrays["adapter.1.b"].numpy().tolist() == [3.5]


def test_bad_evaluation_replies_don_t_end_the_run() -> None:
    def tamper(reply):  # type: ignore[no-untyped-def]
        if reply.metadata.message_type == "evaluate" and reply.content["config"]["client"] == "a":
            reply.content["metrics"]["num-examples"] = -1
        return reply

    strategy = wrap(FedAvg(**all_nodes(2)))
    result = strategy.start(FakeGrid(Adder(by_index), sites(2), tamper), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["loss"] == 1.0
    assert (
        strategy.history[1].dropped[0].reason
        == "evaluation: metric 'num-examples' is -1, must be above 0 and at most 1e+12"
    )


def test_a_run_without_any_good_round_still_has_arrays() -> None:
    # Flower's own result is empty then (fault 29).
    result = wrap(FedAvg(**all_nodes(1))).start(FakeGrid(Adder(by_index), sites(1), lambda reply: None), num_rounds=1)
    assert set(result.arrays) == set(FIRST)


def test_caller_s_configs_aren_t_written_to() -> None:
    config = ConfigRecord({"mine": 1})
    run(wrap(FedProx(proximal_mu=1.0, **all_nodes(1))), FakeGrid(Adder(by_index), sites(1)), train_config=config)
    assert dict(config) == {"mine": 1}
