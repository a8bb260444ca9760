"""Ditto: the shared adapter is FedAvg's to the last bit, the personal ones lie between it and local tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from offsite_fl.errors import ConfigError
from offsite_fl.strategies import Ditto
from offsite_fl.strategies.named import make_strategy
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap
from .quadratics import LR, Quadratics, quadratic_sites

NODES = quadratic_sites([1.0, 4.0], [0.0, 1.0], [3, 3], [1, 3])


def ditto(lam: float = 0.5, **options: Any) -> Ditto:
    return Ditto(lam, **{**all_nodes(2), **options})


def personal(lam: float, rounds: int, lr: float = LR) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The shared adapter, and the personal ones of a and b."""
    client, base = Quadratics(lr), ditto(lam)
    shared = run(wrap(base), FakeGrid(client, NODES), rounds)
    return shared, [client.states[str(base.run_key), site, rounds] for site in "ab"]


def test_the_shared_adapter_is_that_of_fedavg() -> None:
    plain = run(wrap(FedAvg(**all_nodes(2))), FakeGrid(Quadratics(), NODES), 3)
    shared, _ = personal(0.5, 3)
    assert all(torch.equal(shared[name], plain[name]) for name in plain)


def test_streaming_gives_the_same() -> None:
    plain, _ = personal(0.5, 2)
    streamed = run(wrap(ditto(), streaming=True), FakeGrid(Quadratics(), NODES), 2)
    assert all(torch.allclose(plain[name], streamed[name], rtol=0, atol=1e-6) for name in plain)


def test_two_rounds_by_hand() -> None:
    shared, own = personal(0.5, 2)
    for site, node in enumerate(NODES.values()):
        w, v = FIRST["adapter.1.b"].double(), FIRST["adapter.1.b"].double()
        for _ in range(2):
            for _ in range(3):
                v = v - LR * (node["curvature"] * (v - node["middle"]) + 0.5 * (v - w))
            decays = [(1 - LR * n["curvature"]) ** 3 for n in NODES.values()]
            a, b = (n["middle"] + d * (w - n["middle"]) for n, d in zip(NODES.values(), decays, strict=True))
            w = 0.25 * a + 0.75 * b
        assert torch.allclose(own[site]["adapter.1.b"].double(), v, atol=1e-6)
    assert torch.allclose(shared["adapter.1.b"].double(), w, atol=1e-6)


def test_without_a_pull_it_is_local_tuning() -> None:
    _, own = personal(0.0, 3)
    for site, node in enumerate(NODES.values()):
        for name, value in FIRST.items():
            expected = node["middle"] + (1 - LR * node["curvature"]) ** 9 * (value.double() - node["middle"])
            assert torch.allclose(own[site][name].double(), expected, atol=1e-6)


def test_with_a_strong_pull_it_is_the_shared_adapter() -> None:
    """lr * lam = 1 puts v at w - lr * gradient in every step, so it ends within lr * |gradient| of the received w."""
    lr = 1e-4
    received, _ = personal(1 / lr, 1, lr)
    _, own = personal(1 / lr, 2, lr)
    for site, node in enumerate(NODES.values()):
        for name, value in received.items():
            largest = node["curvature"] * float((value - node["middle"]).abs().max())
            assert float((own[site][name] - value).abs().max()) <= 1.01 * lr * largest


def test_the_loss_of_the_personal_adapter_is_told_beside_the_usual_one() -> None:
    client, base = Quadratics(), ditto(0.1)
    strategy = wrap(base)
    result = strategy.start(FakeGrid(client, NODES), num_rounds=40)
    for site, node in zip("ab", NODES.values(), strict=True):
        own = client.states[str(base.run_key), site, 40]
        expected = node["curvature"] / 2 * sum(float((t - node["middle"]).square().sum()) for t in own.values())
        told = strategy.history[40].clients[site]
        assert told["evaluate_personal_loss"] == pytest.approx(expected, rel=1e-4)
        assert told["evaluate_personal_loss"] < told["evaluate_loss"]
    assert result.evaluate_metrics_clientapp[40]["personal_loss"] > 0


def test_resumed_rounds_equal_uninterrupted_ones(tmp_path: Path) -> None:
    _, expected = personal(0.5, 4)
    client, base = Quadratics(), ditto()
    run(wrap(ditto(), run_dir=tmp_path), FakeGrid(client, NODES), 2)
    run(wrap(base, run_dir=tmp_path, resume=True), FakeGrid(client, NODES), 4)
    for site, values in zip("ab", expected, strict=True):
        kept = client.states[str(base.run_key), site, 4]
        assert all(torch.equal(values[name], kept[name]) for name in values)


def test_inside_a_privacy_wrapper() -> None:
    base = DifferentialPrivacyServerSideFixedClipping(ditto(), 0.0, 0.01, 2)
    strategy = wrap(base)
    found = run(strategy, FakeGrid(Quadratics(), NODES))
    moved = sum(float((found[name] - FIRST[name]).square().sum()) for name in FIRST) ** 0.5
    assert 0 < moved <= 0.0101 and not strategy.history[1].dropped


def test_clients_that_know_nothing_of_it_are_dropped_with_the_reason() -> None:
    strategy = wrap(ditto())
    run(strategy, FakeGrid(Adder(lambda node, number: 1.0), sites(2)))
    assert "this run asks for ditto" in strategy.history[1].dropped[0].reason and strategy.history[1].skipped


def test_by_name() -> None:
    made = make_strategy("ditto:lam=0.3")
    assert isinstance(made, Ditto) and made.lam == 0.3
    with pytest.raises(ConfigError, match="can't be negative"):
        make_strategy("ditto:lam=-1")
