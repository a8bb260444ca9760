"""FedPer: personal blocks stay where they are; the shared ones are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError
from offsite_fl.strategies import FedPer
from offsite_fl.strategies.named import make_strategy
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap
from .quadratics import LR, Quadratics, quadratic_sites

NODES = quadratic_sites([1.0, 4.0], [0.0, 1.0], [3, 3], [1, 3])
SHARED, PERSONAL = "adapter.0.w", "adapter.1.b"


def fedper(**options: Any) -> FedPer:
    return FedPer(**{**all_nodes(2), **options})


def tuned(x: torch.Tensor, site: int) -> torch.Tensor:
    """Three exact gradient steps of a site of ``NODES``."""
    node = list(NODES.values())[site]
    decay = (1 - LR * node["curvature"]) ** 3
    return torch.as_tensor(node["middle"] + decay * (x.double() - node["middle"]))


def test_two_rounds_by_hand() -> None:
    client = Quadratics()
    base = fedper(personal="1")
    strategy = wrap(base)
    found = run(strategy, FakeGrid(client, NODES), 2)
    shared, own = FIRST[SHARED].double(), [FIRST[PERSONAL].double()] * 2
    for _ in range(2):
        shared = 0.25 * tuned(shared, 0) + 0.75 * tuned(shared, 1)
        own = [tuned(value, site) for site, value in enumerate(own)]
    assert torch.allclose(found[SHARED].double(), shared, atol=1e-6)
    assert torch.equal(found[PERSONAL], FIRST[PERSONAL])  # the server's stays as it was handed out
    for site, name in enumerate("ab"):
        kept = client.states[str(base.run_key), name, 2]
        assert kept.keys() == {PERSONAL} and torch.allclose(kept[PERSONAL].double(), own[site], atol=1e-6)
        # evaluation is on the site's own model
        node = NODES[50 + site]
        parts = [(shared - node["middle"]).square().sum(), (own[site] - node["middle"]).square().sum()]
        told = strategy.history[2].clients[name]["evaluate_loss"]
        assert told == pytest.approx(node["curvature"] / 2 * float(sum(parts)), rel=1e-4)


def test_streaming_gives_the_same() -> None:
    plain = run(wrap(fedper()), FakeGrid(Quadratics(), NODES), 2)
    streamed = run(wrap(fedper(), streaming=True), FakeGrid(Quadratics(), NODES), 2)
    assert all(torch.allclose(plain[name], streamed[name], rtol=0, atol=1e-6) for name in plain)


def test_personal_blocks_travel_neither_way() -> None:
    client = Quadratics()
    run(wrap(fedper()), FakeGrid(client, NODES), 2)  # "last" is slot 1
    assert client.messages and all(names == [SHARED] for _, _, _, names in client.messages)
    assert {config["local.option.personal"] for _, _, config, _ in client.messages} == {"1"}


def test_a_late_joiner_begins_with_the_bundle_s_values() -> None:
    client = Quadratics()
    base = fedper()
    strategy = wrap(base)
    grid = FakeGrid(client, dict(NODES))
    late = {"name": "z", "curvature": 4.0, "middle": 1.0, "steps": 3, "examples": 1}

    def join(server_round: int, arrays: Any) -> None:
        if server_round == 1:
            grid.nodes[99] = late

    strategy.start(grid, num_rounds=2, evaluate_fn=join)
    kept = client.states[str(base.run_key), "z", 2][PERSONAL]
    assert torch.allclose(kept.double(), tuned(FIRST[PERSONAL], 1), atol=1e-6)


def test_order_of_replies_and_a_single_site() -> None:
    one, other = (run(wrap(fedper()), FakeGrid(Quadratics(), dict(list(NODES.items())[::o])), 3) for o in (1, -1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = run(wrap(FedPer(**all_nodes(1))), FakeGrid(Quadratics(), {50: NODES[50]}))
    assert torch.equal(alone[SHARED], tuned(FIRST[SHARED], 0).float())


def test_resumed_rounds_equal_uninterrupted_ones(tmp_path: Path) -> None:
    whole, parts = Quadratics(), Quadratics()
    first, second = fedper(), fedper()
    expected = run(wrap(first), FakeGrid(whole, NODES), 4)
    run(wrap(fedper(), run_dir=tmp_path), FakeGrid(parts, NODES), 2)
    found = run(wrap(second, run_dir=tmp_path, resume=True), FakeGrid(parts, NODES), 4)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for site in "ab":
        one = whole.states[str(first.run_key), site, 4][PERSONAL]
        assert torch.equal(one, parts.states[str(second.run_key), site, 4][PERSONAL])


@pytest.mark.parametrize(
    ("personal", "message"),
    [
        ("2", "must be last or slots of the adapter; it has 0, 1"),
        ("first", "must be last or slots"),
        ("0/1", "leaves no adapter block to share; it has 2"),
        ("", "must be last or slots"),
    ],
)
def test_slots_that_do_not_go(personal: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(fedper(personal=personal))


def test_other_settings_that_do_not_go_with_it() -> None:
    with pytest.raises(ConfigError, match="can't go around fedper"):
        wrap(DifferentialPrivacyServerSideFixedClipping(fedper(), 0.1, 1.0, 2))
    with pytest.raises(ConfigError, match="leave out lora-train"):
        wrap(fedper(), tune=TuneConfig(lora_rank=2, lora_train="a"))


def test_clients_that_know_nothing_of_it_are_dropped_with_the_reason() -> None:
    strategy = wrap(fedper())
    run(strategy, FakeGrid(Adder(lambda node, number: 1.0), sites(2)))
    assert "this run asks for fedper" in strategy.history[1].dropped[0].reason and strategy.history[1].skipped


def test_by_name() -> None:
    made = make_strategy("fedper:personal=0/3,fraction-train=0.5")
    assert isinstance(made, FedPer) and (made.personal, made.fraction_train) == ("0/3", 0.5)
