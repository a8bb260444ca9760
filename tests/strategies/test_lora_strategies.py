"""LoRA aggregation by hand: the exact strategies give the average of products, plain averaging doesn't."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    Strategy,
)

from offsite_fl.config import LoraOptions, TuneConfig
from offsite_fl.errors import ConfigError
from offsite_fl.strategies import FFALoRA, FlexLoRA, FLoRA, OffsiteTuning, RoLoRA
from offsite_fl.strategies.named import make_strategy
from offsite_fl.wire.codecs import decode, encode
from tests.flower_fakes import FakeGrid, all_nodes

from .conftest import StubBundle, run, sites

A, B, W, NORM = "adapter.0.q.lora_A.weight", "adapter.0.q.lora_B.weight", "adapter.0.q.weight", "adapter.0.n.weight"
START = {W: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), NORM: torch.tensor([0.5])}
FRESH_A = torch.tensor([[0.5, 0.25], [0.125, 2.0]])
LORA = ["flora", "flexlora", "ffa-lora", "rolora"]

Factors = dict[str, torch.Tensor]
Tuned = Callable[[dict[str, Any], int, Mapping[str, torch.Tensor]], Factors]


@dataclass
class Bundle(StubBundle):
    """A bundle of one linear and one norm."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(START)


@dataclass
class Owner:
    """An owner of one linear [2, 2] and one norm; ``flipped``: the linear is stored [in, out]."""

    flipped: bool = False
    bundle: Any = field(default_factory=Bundle)

    def initial_state(self, lora: LoraOptions | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
        return dict(START) if lora is None else {A: FRESH_A[: lora.rank].clone(), B: torch.zeros(2, lora.rank)}

    def lora_targets(self, lora: LoraOptions) -> dict[str, bool]:
        return {W: self.flipped}


class Site:
    """A client that answers with the factors that ``tuned(node config, round, received)`` gives it."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.received: list[dict[str, torch.Tensor]] = []
        self.configs: list[dict[str, Any]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        if message.metadata.message_type == "query.bundle":
            state = ConfigRecord({"bundle.held": True, "client": name})
            return Message(RecordDict({"config": state}), reply_to=message)
        arrays, config = message.content.array_records["arrays"], message.content.config_records["config"]
        zeros = {key: torch.zeros(tuple(array.shape)) for key, array in arrays.items()}
        like = {key: START.get(key, zero) for key, zero in zeros.items()}
        received = decode(arrays, config, like, str(config["wire.codec"]))
        self.received.append(received)
        self.configs.append(dict(config))
        factors = self.tuned(dict(context.node_config), int(config["server-round"]), received)  # type: ignore[arg-type]
        wired, notes = encode(factors, {n: torch.zeros_like(t) for n, t in factors.items()}, str(config["wire.codec"]))
        metrics = MetricRecord({"num-examples": int(context.node_config["examples"]), "train_loss": 1.0})
        content = {"arrays": wired, "metrics": metrics, "config": ConfigRecord({**notes, "client": name})}
        return Message(RecordDict(content), reply_to=message)


def wrap(base: Strategy, *, rank: int = 1, alpha: float = 1.0, owner: Owner | None = None, **options: Any) -> Any:
    tune = options.pop("tune", TuneConfig(lora_rank=rank, lora_alpha=alpha))
    return OffsiteTuning(base, owner or Owner(), tune=tune, **options)  # type: ignore[arg-type]


def make(name: str, count: int = 2) -> Strategy:
    return make_strategy(name, **all_nodes(count), fraction_evaluate=0.0)


def corners(node: dict[str, Any], server_round: int, received: Mapping[str, torch.Tensor]) -> Factors:
    """Site a wants B A = e1 e1', site b e2 e2'."""
    i = node["index"]
    return {A: torch.eye(2)[i : i + 1], B: torch.eye(2)[:, i : i + 1]}


def only(names: str, tuned: Tuned) -> Tuned:
    return lambda node, r, received: {n: t for n, t in tuned(node, r, received).items() if n in names}


def product(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return state[B] @ state[A]


def nothing_dropped(strategy: OffsiteTuning) -> bool:
    return not any(record.skipped or record.dropped for record in strategy.history)


# The hand-made case: what should be added is (e1 e1' + e2 e2') / 2 -----------------------------------------------

MEAN_OF_PRODUCTS = torch.tensor([[0.5, 0.0], [0.0, 0.5]])


def test_plain_averaging_of_factors_is_biased() -> None:
    strategy = wrap(make("fedavg"))
    after = run(strategy, FakeGrid(Site(corners), sites(2)))
    # (e1 + e2)/2 (e1 + e2)'/2: half of the wanted change is lost and as much appears where nobody wanted any
    assert product(after).tolist() == [[0.25, 0.25], [0.25, 0.25]] and nothing_dropped(strategy)


def test_flora_is_exact_at_rank_one() -> None:
    strategy = wrap(make("flora"), alpha=3.0)  # scale 3 / 1
    after = run(strategy, FakeGrid(Site(corners), sites(2)))
    assert after[W].tolist() == (START[W] + 3 * MEAN_OF_PRODUCTS).tolist() and torch.equal(after[NORM], START[NORM])
    assert nothing_dropped(strategy) and strategy.update().lora is None and strategy.lora is None
    assert torch.equal(strategy.update().tensors[W], after[W])


def test_flora_by_weight_over_two_rounds_and_a_transposed_linear() -> None:
    strategy = wrap(make("flora"), rank=1, alpha=2.0, owner=Owner(flipped=True))

    def tuned(node: dict[str, Any], r: int, received: Mapping[str, torch.Tensor]) -> Factors:
        return {A: torch.tensor([[1.0, 2.0]]) * r, B: torch.tensor([[1.0], [-1.0]]) * (node["index"] + 1)}

    site = Site(tuned)
    after = run(strategy, FakeGrid(site, sites(2, [3, 1])), 2)
    # B's mean weight is (3 * 1 + 1 * 2) / 4 = 1.25, A counts 1 in round 1 and 2 in round 2; (B A)' is added
    step = 2 * 1.25 * torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert torch.allclose(site.received[2][W], START[W] + step) and torch.allclose(after[W], START[W] + 3 * step)
    assert site.configs[0]["tune.lora-fresh"] is True and site.configs[0]["tune.lora-rank"] == 1


def test_flexlora_is_exact_where_the_rank_suffices_and_else_the_best() -> None:
    def wide(node: dict[str, Any], r: int, received: Mapping[str, torch.Tensor]) -> Factors:
        given = corners(node, r, received)
        return {A: torch.cat([given[A], torch.zeros(1, 2)]), B: torch.cat([given[B], torch.zeros(2, 1)], dim=1)}

    exact = run(wrap(make("flexlora"), rank=2), FakeGrid(Site(wide), sites(2)))
    torch.testing.assert_close(product(exact), MEAN_OF_PRODUCTS)
    strategy = wrap(make("flexlora"))
    result = strategy.start(FakeGrid(Site(corners), sites(2, [1, 3])), num_rounds=1)
    best = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    # of diag(1/4, 3/4) the best rank one is diag(0, 3/4): 1/16 of 10/16 is lost; U S and V' by hand
    torch.testing.assert_close(product(best), torch.diag(torch.tensor([0.0, 0.75])))
    torch.testing.assert_close(best[A], torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(best[B], torch.tensor([[0.0], [0.75]]))
    metrics = result.train_metrics_clientapp[1]
    assert metrics["lora_lost"] == pytest.approx(0.1)
    assert metrics["lora_bias"] == pytest.approx(3 / 8 / np.hypot(1 / 4, 3 / 4)) and metrics["train_loss"] == 1.0


def test_ffa_lora_keeps_a_and_averages_b() -> None:
    strategy = wrap(make("ffa-lora"))
    site = Site(only(B, corners))
    after = run(strategy, FakeGrid(site, sites(2, [1, 3])), 2)
    assert nothing_dropped(strategy) and {config["tune.lora-train"] for config in site.configs} == {"b"}
    assert torch.equal(after[A], FRESH_A[:1])
    products = [torch.tensor(b) @ FRESH_A[:1] for b in ([[1.0], [0.0]], [[0.0], [1.0]])]
    torch.testing.assert_close(product(after), 0.25 * products[0] + 0.75 * products[1])


def test_rolora_averages_b_and_a_in_turn() -> None:
    def tuned(node: dict[str, Any], r: int, received: Mapping[str, torch.Tensor]) -> Factors:
        return {B: received[B] + corners(node, r, received)[B]} if r % 2 else {A: received[A] * (node["index"] + 2.0)}

    strategy = wrap(make("rolora"))
    site = Site(tuned)
    after = run(strategy, FakeGrid(site, sites(2)), 3)
    assert nothing_dropped(strategy) and [c["tune.lora-train"] for c in site.configs[::2]] == ["b", "a", "b"]
    # round 1: B = 1/2 each; round 2: A times (2 + 3) / 2; round 3: B = 1 each
    assert torch.equal(site.received[2][A], FRESH_A[:1]) and site.received[2][B].tolist() == [[0.5], [0.5]]
    torch.testing.assert_close(site.received[4][A], 2.5 * FRESH_A[:1])
    assert torch.equal(site.received[4][B], site.received[2][B])  # what isn't trained stays to the bit
    torch.testing.assert_close(product(after), torch.ones(2, 1) @ (2.5 * FRESH_A[:1]))


# What holds for all of them ----------------------------------------------------------------------------------------


def moves(node: dict[str, Any], server_round: int, received: Mapping[str, torch.Tensor]) -> Factors:
    """Random factors of rank 2, the same for the same site and round; only those that the state's form asks for."""
    rng = np.random.default_rng([node["index"], server_round])
    return {A: torch.from_numpy(rng.normal(size=(2, 2))).float(), B: torch.from_numpy(rng.normal(size=(2, 2))).float()}


def answers(name: str) -> Tuned:
    asked = {"ffa-lora": lambda r: B, "rolora": lambda r: B if r % 2 else A}.get(name, lambda r: A + B)
    return lambda node, r, received: {n: t for n, t in moves(node, r, received).items() if n in asked(r)}


def meant(name: str, node: dict[str, Any], r: int, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The product that one site's reply stands for."""
    factors = {**{n: t for n, t in state.items() if n in (A, B)}, **answers(name)(node, r, state)}
    return product(factors)


@pytest.mark.parametrize("name", LORA)
def test_a_round_is_the_average_of_products_or_the_best_of_rank_two(name: str) -> None:
    weights = [3, 1, 4]
    strategy = wrap(make(name, 3), rank=2, alpha=4.0)
    before = dict(strategy.state)
    after = run(strategy, FakeGrid(Site(answers(name)), sites(3, weights)))
    expected = sum(w / 8 * meant(name, {"index": i}, 1, before).double() for i, w in enumerate(weights))
    # the linear is 2 by 2, so rank 2 holds every average: all four are exact here
    found = (after[W] - START[W]) / 2 if name == "flora" else product(after)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LORA)
def test_one_site_s_average_is_that_site(name: str) -> None:
    strategy = wrap(make(name, 1), rank=2, alpha=4.0)
    before = dict(strategy.state)
    after = run(strategy, FakeGrid(Site(answers(name)), sites(1)))
    found = (after[W] - START[W]) / 2 if name == "flora" else product(after)
    torch.testing.assert_close(found, meant(name, {"index": 0}, 1, before))


@pytest.mark.parametrize("name", LORA)
def test_the_order_of_nodes_changes_nothing(name: str) -> None:
    nodes = list(sites(4, [3, 1, 4, 1]).items())
    orders = [dict(nodes), dict(nodes[::-1])]
    results = [run(wrap(make(name, 4), rank=2), FakeGrid(Site(answers(name)), order), 2) for order in orders]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name", LORA)
def test_resumed_rounds_equal_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    def grid() -> FakeGrid:
        return FakeGrid(Site(answers(name)), sites(3, [3, 1, 4]))

    expected = run(wrap(make(name, 3), rank=2, run_dir=tmp_path / "whole"), grid(), 5)
    run(wrap(make(name, 3), rank=2, run_dir=tmp_path / "parts"), grid(), 3)
    found = run(wrap(make(name, 3), rank=2, run_dir=tmp_path / "parts", resume=True), grid(), 5)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_short_codecs_change_little(name: str, codec: str) -> None:
    exact = run(wrap(make(name, 3), rank=2), FakeGrid(Site(answers(name)), sites(3)), 2)
    strategy = wrap(make(name, 3), rank=2, codec=codec)
    short = run(strategy, FakeGrid(Site(answers(name)), sites(3)), 2)
    assert nothing_dropped(strategy)
    for found, wanted in [(short[W], exact[W])] if name == "flora" else [(product(short), product(exact))]:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.15)


def test_flora_loses_nothing_of_small_steps_to_a_short_codec() -> None:
    """bf16 rounds 3.0 in steps of 1/64; thirty rounds of 0.001 must still add up on the server."""
    tiny = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[0.0], [2.0**-10]])}
    after = run(wrap(make("flora", 1), codec="bf16"), FakeGrid(Site(lambda *a: tiny), sites(1)), 30)
    assert float(after[W][1, 0]) == pytest.approx(3 + 30 * 2.0**-10, abs=1e-5)


def test_what_a_reply_says_about_a_frozen_factor_is_not_believed() -> None:
    strategy = wrap(make("ffa-lora"))
    after = run(strategy, FakeGrid(Site(corners), sites(2)))  # both factors, A another one than was sent
    assert nothing_dropped(strategy) and torch.equal(after[A], FRESH_A[:1])
    torch.testing.assert_close(after[B], torch.tensor([[0.5], [0.5]]))


@pytest.mark.parametrize(("name", "wrong"), [("ffa-lora", A), ("flora", B), ("flexlora", B), ("rolora", A)])
def test_replies_of_the_wrong_tensors_are_dropped(name: str, wrong: str) -> None:
    strategy = wrap(make(name), min_results=2)
    before = dict(strategy.state)
    after = run(strategy, FakeGrid(Site(only(wrong, corners)), sites(2)))
    reasons = [dropped.reason for dropped in strategy.history[1].dropped]
    assert all("1 missing tensor: " in reason for reason in reasons[:2]) and reasons[2].startswith("0 good replies")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_norm_of_an_update_is_that_of_the_change_it_stands_for() -> None:
    # scale 2 times e1 e1' has norm 2: in the full adapter, and not that of the factors
    strategy = wrap(make("flora", 1), alpha=2.0, max_update_norm=1.99)
    run(strategy, FakeGrid(Site(corners), sites(1)))
    assert "norm is 2" in strategy.history[1].dropped[0].reason
    bounded = wrap(make("flora", 1), alpha=2.0, max_update_norm=2.01)
    run(bounded, FakeGrid(Site(corners), sites(1)))
    assert nothing_dropped(bounded)


def test_bytes_are_counted_as_they_travel() -> None:
    def update_bytes(name: str, rounds: int = 1) -> int:
        strategy = wrap(make(name, 1), rank=2)
        run(strategy, FakeGrid(Site(answers(name)), sites(1)), rounds)
        return int(strategy.ledger.total(round=rounds, kind="update", direction="up"))

    # one factor of 16 bytes (and numpy's header) less than both; the metrics and notes are the same
    assert update_bytes("ffa-lora") < update_bytes("flexlora") - 16
    assert update_bytes("rolora", 2) < update_bytes("flexlora", 2) - 16


# Together with other settings and strategies ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LORA)
def test_they_need_lora(name: str) -> None:
    with pytest.raises(ConfigError, match=r"lora-rank is 0: set tune\.lora-rank"):
        wrap(make(name), tune=TuneConfig())
    with pytest.raises(ConfigError, match="itself says which factors are trained"):
        wrap(make(name), tune=TuneConfig(lora_rank=1, lora_train="b"))


def test_fresh_factors_need_a_strategy_of_full_adapters() -> None:
    for base in (FlexLoRA(), FFALoRA(), RoLoRA()):
        with pytest.raises(ConfigError, match="lora-fresh federates the full adapter"):
            wrap(base, tune=TuneConfig(lora_rank=1, lora_fresh=True))
    assert wrap(FLoRA()).tune.lora_fresh and not wrap(FedAvg()).tune.lora_fresh


def test_fresh_factors_under_any_strategy() -> None:
    tune = TuneConfig(lora_rank=1, lora_alpha=1.0, lora_fresh=True)
    fedavg = run(wrap(FedAvg(**all_nodes(2)), tune=tune), FakeGrid(Site(corners), sites(2)))
    assert torch.equal(fedavg[W], START[W] + MEAN_OF_PRODUCTS)
    median = run(wrap(FedMedian(**all_nodes(2)), tune=tune), FakeGrid(Site(corners), sites(2)))
    assert torch.equal(median[W], START[W] + MEAN_OF_PRODUCTS)  # of two, the median is the mean
    adam = wrap(FedAdam(eta=0.1, **all_nodes(2)), tune=tune)
    moved = run(adam, FakeGrid(Site(corners), sites(2)))
    assert nothing_dropped(adam) and torch.equal(moved[W][0, 1], START[W][0, 1]) and moved[W][0, 0] > START[W][0, 0]


def test_one_factor_under_any_strategy() -> None:
    strategy = wrap(FedAdam(eta=0.1, **all_nodes(2)), tune=TuneConfig(lora_rank=1, lora_train="b"))
    after = run(strategy, FakeGrid(Site(only(B, corners)), sites(2)), 2)
    assert nothing_dropped(strategy) and torch.equal(after[A], FRESH_A[:1]) and bool((after[B] > 0).all())


def test_privacy_noise_stays_off_the_frozen_factor() -> None:
    base = DifferentialPrivacyServerSideFixedClipping(make("ffa-lora"), 1.0, 0.1, 2)
    strategy = wrap(base)
    after = run(strategy, FakeGrid(Site(only(B, corners)), sites(2)))
    assert nothing_dropped(strategy) and torch.equal(after[A], FRESH_A[:1]) and bool((after[B] != 0).all())


def test_clients_can_t_clip_fresh_factors() -> None:
    with pytest.raises(ConfigError, match="can't compare fresh LoRA factors"):
        wrap(DifferentialPrivacyClientSideFixedClipping(make("flora"), 1.0, 1.0, 2))


def test_the_form_can_t_change_between_rounds() -> None:
    strategy = wrap(make("fedavg"))
    with pytest.raises(ConfigError, match="can't change between rounds"):
        strategy.start(FakeGrid(Site(corners), sites(2)), train_config=ConfigRecord({"tune.lora-fresh": True}))


def test_named_ones_take_fedavg_s_options() -> None:
    base = make_strategy("flora:fraction-train=0.5,min-train-nodes=3")
    assert isinstance(base, FLoRA) and base.fraction_train == 0.5 and base.min_train_nodes == 3
    assert [type(make_strategy(name)) for name in LORA] == [FLoRA, FlexLoRA, FFALoRA, RoLoRA]
