"""SCAFFOLD: the server's formulas by hand, and the true optimum where plain averaging misses it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from offsite_fl import local
from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError, WireError
from offsite_fl.strategies import Scaffold
from offsite_fl.strategies.named import make_strategy
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap
from .quadratics import Quadratics, far, quadratic_sites

SGD = TuneConfig(optimizer="sgd")
# F_a = 1/2 |x|^2, F_b = 10/2 |x - 1|^2, whose sum is least at 10 / 11.
CURVED = quadratic_sites([1.0, 10.0], [0.0, 1.0], [10, 10])


def scaffold(count: int = 2, **options: Any) -> Scaffold:
    return Scaffold(**{**all_nodes(count), "fraction_evaluate": 0.0, **options})


class Scripted:
    """Answers with (shift of the adapter, sum of the learning rates) by site and round; keeps what came."""

    def __init__(self, script: dict[tuple[str, int], tuple[float, float]]) -> None:
        self.script = script
        self.got: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["name"])
        if message.metadata.message_type == "query.bundle":
            held = ConfigRecord({"bundle.held": True, "client": site})
            return Message(RecordDict({"config": held}), reply_to=message)
        config = next(iter(message.content.config_records.values()))
        when = (site, int(config["server-round"]))  # type: ignore[arg-type]
        arrays = next(iter(message.content.array_records.values()))
        self.got[when] = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        shift, rates = self.script[when]
        out = {n: Array(a.numpy() + np.float32(shift)) for n, a in arrays.items() if not n.startswith("control.")}
        told = {"num-examples": int(context.node_config["examples"]), "train_loss": 1.0, "lr_sum": rates}
        metrics = MetricRecord(told)
        told = ConfigRecord({"client": site, "wire.codec": "fp32", "local.algorithm": "scaffold"})
        return Message(RecordDict({"arrays": ArrayRecord(out), "metrics": metrics, "config": told}), reply_to=message)


def shifted(amount: float) -> dict[str, torch.Tensor]:
    return {name: tensor + amount for name, tensor in FIRST.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=atol) for n in one)


def test_two_rounds_by_hand() -> None:
    # c_i+ - c_i = (x - y_i) / lr_sum - c. Round 1: x + 1/2 * mean(1, 3) = x + 1; c = mean(-1 / 0.5, -3 / 0.5) = -4.
    # Round 2: x + 1 + 1/2 * 4 = x + 3; the changes are -4 / 2 + 4 = 2 and -4 / 1 + 4 = 0, so c = -4 + 1.
    client = Scripted({("a", 1): (1, 0.5), ("b", 1): (3, 0.5), ("a", 2): (4, 2.0), ("b", 2): (4, 1.0)})
    base = scaffold(eta=0.5)
    found = run(wrap(base, tune=SGD), FakeGrid(client, sites(2, [1, 5])), 2)
    assert same(found, shifted(3.0))
    first, second = client.got["a", 1], client.got["b", 2]
    assert all(not t.any() for name, t in first.items() if name.startswith("control."))
    assert {n.removeprefix("control.") for n in first if n.startswith("control.")} == set(FIRST)
    assert all(torch.allclose(t, torch.tensor(-4.0)) for name, t in second.items() if name.startswith("control."))
    assert all(np.allclose(value, -3.0) for value in base.control().values())


def test_the_control_variate_counts_the_sites_that_were_not_there() -> None:
    # 2 of 4 reply: c = 2 / 4 * mean(-2 / 0.5, -2 / 0.25) = -3, while x moves by the mean of the two.
    client = Scripted({(site, 1): (2, 0.5 if site in "ac" else 0.25) for site in "abcd"})
    base = scaffold(4)
    grid = FakeGrid(client, sites(4))

    def tamper(reply: Message) -> Message | None:
        named = reply.content["config"].get("client") in ("c", "d")
        return None if named and reply.metadata.message_type == "train" else reply

    grid.tamper = tamper
    assert same(run(wrap(base, tune=SGD), grid), shifted(2.0))
    assert all(np.allclose(value, -3.0) for value in base.control().values())


def test_by_examples() -> None:
    # (1 * 1 + 5 * 3) / 6 = 8 / 3 and (1 * -1 / 0.5 + 5 * -3 / 0.5) / 6 = -16 / 3
    client = Scripted({("a", 1): (1, 0.5), ("b", 1): (3, 0.5)})
    base = scaffold(by_examples=True)
    assert same(run(wrap(base, tune=SGD), FakeGrid(client, sites(2, [1, 5]))), shifted(8 / 3))
    assert all(np.allclose(value, -16 / 3) for value in base.control().values())


def test_order_of_replies_and_a_single_site() -> None:
    results = []
    for order in (1, -1):
        grid = FakeGrid(Quadratics(), dict(list(CURVED.items())[::order]))
        results.append(run(wrap(scaffold(), tune=SGD), grid, 3))
    assert same(*results, atol=0)
    client = Scripted({("a", 1): (0.1, 0.3)})
    found = run(wrap(scaffold(1), tune=SGD), FakeGrid(client, sites(1)))
    assert same(found, {name: t + np.float32(0.1) for name, t in FIRST.items()}, atol=0)


def test_scaffold_finds_the_optimum_that_plain_averaging_misses() -> None:
    """With lr 0.05 and ten steps FedAvg rests where mean(m_i + r_i^10 (x - m_i)) = x, r_i = 1 - 0.05 a_i."""
    decay = (0.95**10 + 0.5**10) / 2
    rest = (1 - 0.5**10) / 2 / (1 - decay)
    plain = run(wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(2)), tune=SGD), FakeGrid(Quadratics(), CURVED), 60)
    assert far(plain, rest) < 1e-4 and far(plain, 10 / 11) > 0.15
    base = scaffold()
    corrected = run(wrap(base, tune=SGD), FakeGrid(Quadratics(), CURVED), 60)
    assert far(corrected, 10 / 11) < 1e-4
    # at the optimum the mean of the sites' gradients is zero
    assert max(float(np.abs(value).max()) for value in base.control().values()) < 1e-3


def test_the_optimum_is_found_with_half_of_the_sites_in_a_round() -> None:
    four = quadratic_sites([1.0, 10.0, 2.0, 5.0], [0.0, 1.0, -1.0, 2.0], [10, 10, 10, 10])
    best = (10 - 2 + 10) / 18
    random.seed(0)  # Flower draws nodes with it
    base = Scaffold(fraction_train=0.5, min_train_nodes=2, min_available_nodes=4, fraction_evaluate=0.0)
    assert far(run(wrap(base, tune=SGD), FakeGrid(Quadratics(), four), 100), best) < 1e-2


def test_a_reply_that_was_not_used_leaves_no_trace_in_its_site() -> None:
    """c stays the mean of the c_i that count, though a site's replies are lost in every third round."""
    lost = [0]

    def tamper(reply: Message) -> Message | None:
        if reply.metadata.message_type == "train" and reply.content["config"].get("client") == "a":
            lost[0] += 1
            return None if lost[0] % 3 == 0 else reply
        return reply

    client = Quadratics()
    grid = FakeGrid(client, CURVED, tamper)
    base = scaffold(2)
    strategy = wrap(base, tune=SGD)
    run(strategy, grid, 8)
    assert sum(bool(record.dropped) for record in strategy.history) == 2
    last = {site: strategy.journal.last_used(node, "num-examples") for node, site in ((50, "a"), (51, "b"))}
    assert last == {"a": 8, "b": 8}
    for name, value in base.control().items():
        kept = [client.states[str(base.run_key), site, last[site]][name] for site in "ab"]
        assert np.allclose(value, (kept[0] + kept[1]).numpy() / 2, atol=1e-5)


def test_resumed_rounds_equal_uninterrupted_ones(tmp_path: Path) -> None:
    whole, parts = Quadratics(), Quadratics()
    expected = run(wrap(scaffold(), tune=SGD), FakeGrid(whole, CURVED), 4)
    run(wrap(scaffold(), tune=SGD, run_dir=tmp_path), FakeGrid(parts, CURVED), 2)
    moved = {node + 900: config for node, config in CURVED.items()}  # nodes have other ids in a new run
    base = scaffold()
    resumed = wrap(base, tune=SGD, run_dir=tmp_path, resume=True)
    found = run(resumed, FakeGrid(parts, moved), 4)
    assert same(expected, found, atol=0)
    keys = {config["local.run"] for _, _, config, _ in parts.messages}
    assert keys == {base.run_key} and keys.isdisjoint({config["local.run"] for _, _, config, _ in whole.messages})


def control_of(base: Scaffold) -> float:
    """The largest value of c."""
    return max((float(np.abs(value).max()) for value in base.control().values()), default=0.0)


def test_nothing_travels_up_beside_the_adapter() -> None:
    """What a site would claim of its control variate isn't asked for: such a reply isn't in the form of the run."""

    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train" and reply.content["config"]["client"] == "a":
            arrays = reply.content["arrays"]
            for name in list(arrays):
                arrays["control." + name] = Array(np.full_like(arrays[name].numpy(), 1e6))
        return reply

    base = scaffold()
    strategy = wrap(base, tune=SGD)
    client = Scripted({("a", 1): (0.1, 0.5), ("b", 1): (0.3, 0.5)})
    assert same(run(strategy, FakeGrid(client, sites(2), tamper)), shifted(0.3))
    assert "2 unknown tensors: 'control.adapter" in strategy.history[1].dropped[0].reason
    assert control_of(base) == pytest.approx(0.5 * 0.3 / 0.5, rel=1e-5)  # one of two sites


def test_the_bounds_on_updates_hold_the_control_variate_too() -> None:
    # The five values of FIRST: a shift of 1e6 is dropped, one of 1 scaled down to the norm 0.1, so by sqrt(5) * 10.
    script = {("a", 1): (1e6, 0.5), ("b", 1): (0.04, 0.5), ("c", 1): (1.0, 0.5)}
    base = scaffold(3)
    strategy = wrap(base, tune=SGD, max_update_norm=3.0, clip_update_norm=0.1)
    run(strategy, FakeGrid(Scripted(script), sites(3)))
    assert [dropped.node for dropped in strategy.history[1].dropped] == ["a"]
    assert control_of(base) == pytest.approx((0.04 + 0.1 / 5**0.5) / 0.5 / 3, rel=1e-4)


@pytest.mark.parametrize("rates", [0.0, -1.0, float("nan"), float("inf"), 1e-7, 1e7])
def test_a_claimed_sum_of_learning_rates_is_held_to_the_others(rates: float) -> None:
    script = {(site, 1): (0.1, 0.5) for site in "bc"} | {("a", 1): (0.1, rates)}
    base = scaffold(3)
    strategy = wrap(base, tune=SGD)
    assert same(run(strategy, FakeGrid(Scripted(script), sites(3))), shifted(0.1))
    (dropped,) = strategy.history[1].dropped
    assert dropped.node == "a" and "lr_sum" in dropped.reason
    assert control_of(base) == pytest.approx(2 / 3 * 0.1 / 0.5, rel=1e-4)


def test_an_aggregate_that_is_not_finite_leaves_the_control_variate_as_it_was() -> None:
    script = {(site, 1): (0.1, 0.5) for site in "ab"} | {(site, 2): (3e38, 0.5) for site in "ab"}
    base = scaffold()
    strategy = wrap(base, tune=SGD)
    run(strategy, FakeGrid(Scripted(script), sites(2)), 2)
    assert strategy.history[2].skipped and control_of(base) == pytest.approx(0.2, rel=1e-4)


def test_a_control_variate_beyond_fp32_is_refused() -> None:
    """Each change is finite, and so is the new x; only the sum of the changes isn't."""
    base = scaffold()
    base.current = ArrayRecord({"w": Array(np.zeros(1, np.float32))})
    kept = {"w": np.full(1, 2e38)}
    base.control_sum = kept
    replies = []
    for _ in range(2):
        arrays = ArrayRecord({"w": Array(np.ones(1, np.float32)), "control.w": Array(np.full(1, 1e38, np.float32))})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, 1, "train"))
    with pytest.raises(WireError, match="control variate of 'w' would have values that aren't finite"):
        base.aggregate_train(1, replies)
    assert base.control_sum is kept


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_the_mean_of_the_sites_holds_under_codecs(codec: str) -> None:
    """Server and sites read the change off the same rounded values, so c stays the mean of what the sites keep."""
    client = Quadratics()
    base = scaffold()
    run(wrap(base, tune=SGD, codec=codec), FakeGrid(client, CURVED), 5)
    for name, value in base.control().items():
        kept = [client.states[str(base.run_key), site, 5][name] for site in "ab"]
        assert np.allclose(value, (kept[0] + kept[1]).numpy() / 2, rtol=0, atol=1e-5)


def test_clients_that_know_nothing_of_it_are_dropped_with_the_reason() -> None:
    strategy = wrap(scaffold(), tune=SGD)
    assert same(run(strategy, FakeGrid(Adder(lambda node, number: 1.0), sites(2))), FIRST, atol=0)
    reasons = [dropped.reason for dropped in strategy.history[1].dropped]
    assert "ran 'plain tuning', this run asks for scaffold" in reasons[0] and strategy.history[1].skipped


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (TuneConfig(), "needs tune.optimizer = 'sgd', got 'adamw'"),
        (TuneConfig(optimizer="sgd", proximal_mu=0.1), "leave out proximal-mu"),
        (TuneConfig(optimizer="sgd", lora_rank=2, lora_train="b"), "leave out lora-train"),
    ],
)
def test_settings_that_do_not_go_with_it(tune: TuneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(scaffold(), tune=tune)
    with pytest.raises(ConfigError, match="leave out lora-fresh"):
        local.Scaffold().check(TuneConfig(optimizer="sgd", lora_rank=2, lora_fresh=True))


def test_it_needs_all_replies_at_once() -> None:
    with pytest.raises(ConfigError, match="Scaffold needs all replies of a round at once"):
        wrap(scaffold(), tune=SGD, streaming=True)


def test_no_privacy_wrapper_goes_around_it() -> None:
    with pytest.raises(ConfigError, match="can't go around scaffold"):
        wrap(DifferentialPrivacyServerSideFixedClipping(scaffold(), 0.1, 1.0, 2), tune=SGD)


def test_by_name() -> None:
    made = make_strategy("scaffold:eta=0.5,by-examples=true,min-train-nodes=3")
    assert isinstance(made, Scaffold) and (made.eta, made.by_examples, made.min_train_nodes) == (0.5, True, 3)
    with pytest.raises(ConfigError, match="must be of type bool"):
        make_strategy("scaffold:by-examples=maybe")
    with pytest.raises(ConfigError, match="eta must be above 0"):
        make_strategy("scaffold:eta=0")
