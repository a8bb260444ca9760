"""Every Flower strategy inside the wrapper gives what it gives alone; privacy wrappers in both nesting orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.errors import ConfigError
from offsite_fl.strategies import OffsiteTuning
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap

SITES = 7  # Bulyan needs 4 * 1 + 3
COMMON = {**all_nodes(SITES), "fraction_evaluate": 0.0}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: flower.FedAvg(**COMMON),
    "FedAvgM": lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9, **COMMON),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1, **COMMON),
    "FedAdam": lambda: flower.FedAdam(**COMMON),
    "FedAdagrad": lambda: flower.FedAdagrad(**COMMON),
    "FedYogi": lambda: flower.FedYogi(**COMMON),
    "FedMedian": lambda: flower.FedMedian(**COMMON),
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.2, **COMMON),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1, **COMMON),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3, **COMMON),
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=1, **COMMON),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1, **COMMON),
}
# Without noise, so that results can be compared; with a norm that really clips.
WRAPPERS: dict[str, Callable[[Strategy], Strategy]] = {
    "server fixed": lambda s: flower.DifferentialPrivacyServerSideFixedClipping(s, 0.0, 0.5, SITES),
    "client fixed": lambda s: flower.DifferentialPrivacyClientSideFixedClipping(s, 0.0, 0.5, SITES),
    "server adaptive": lambda s: flower.DifferentialPrivacyServerSideAdaptiveClipping(s, 0.0, SITES, 0.5),
    "client adaptive": lambda s: flower.DifferentialPrivacyClientSideAdaptiveClipping(s, 0.0, SITES, 0.5),
}
MODS = {"client fixed": fixedclipping_mod, "client adaptive": adaptiveclipping_mod}


def shifts(node: dict[str, Any], server_round: int) -> float:
    return float(np.random.default_rng([node["index"], server_round]).normal(1.0, 0.2))


def grid_for(wrapper: str = "", codec_reference: dict[str, torch.Tensor] | None = None) -> FakeGrid:
    """Sites whose training, and nothing else, runs inside the wrapper's own client mod."""
    adder = Adder(shifts, reference=codec_reference)
    mod = MODS.get(wrapper)

    def client(message: Message, context: Context) -> Message:
        if mod is not None and message.metadata.message_type == "train":
            return mod(message, context, adder)
        return adder(message, context)

    return FakeGrid(client, sites(SITES, [1, 2, 3, 1, 2, 3, 1]))


def alone(base: Strategy, grid: FakeGrid, rounds: int = 3) -> dict[str, torch.Tensor]:
    """What Flower's own ``start`` gives."""
    result = base.start(grid, ArrayRecord(dict(FIRST)), num_rounds=rounds)
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> bool:
    # In doubles, which is what Flower's FedAdam turns its arrays into when it is alone.
    return all(torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=atol) for name in FIRST)


def nothing_dropped(strategy: OffsiteTuning) -> bool:
    return not any(record.skipped or record.dropped for record in strategy.history)


@pytest.mark.parametrize("name", STRATEGIES)
def test_inside_the_wrapper_as_alone(name: str) -> None:
    expected = alone(STRATEGIES[name](), grid_for())
    strategy = wrap(STRATEGIES[name]())
    found = run(strategy, grid_for(), 3)
    assert nothing_dropped(strategy) and close(expected, found)
    assert not close(found, FIRST, atol=0.01)


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "Krum"])
def test_short_floats_change_little(name: str, codec: str) -> None:
    expected = run(wrap(STRATEGIES[name]()), grid_for(), 2)
    strategy = wrap(STRATEGIES[name](), codec=codec)
    found = run(strategy, grid_for(codec_reference=dict(FIRST)), 2)
    # values to 8 with a relative error of 2**-8 in each of two rounds, down and up; FedAdam's steps don't grow it
    assert nothing_dropped(strategy) and close(expected, found, atol=4 * 8 * 2**-8)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("base", ["FedAvg", "FedAdam"])
def test_around_a_privacy_wrapper(base: str, wrapper: str) -> None:
    expected = alone(WRAPPERS[wrapper](STRATEGIES[base]()), grid_for(wrapper))
    strategy = wrap(WRAPPERS[wrapper](STRATEGIES[base]()))
    found = run(strategy, grid_for(wrapper), 3)
    assert nothing_dropped(strategy) and close(expected, found)
    if base == "FedAvg":
        moved = torch.sqrt(sum(((found[n] - FIRST[n]) ** 2).sum() for n in FIRST))  # type: ignore[call-overload]
        assert 0 < moved <= 3 * 0.5 + 1e-4  # three rounds of at most 0.5, or less where the norm adapts


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_a_privacy_wrapper(wrapper: str) -> None:
    expected = alone(WRAPPERS[wrapper](FedAvg(**COMMON)), grid_for(wrapper))
    inner = wrap(FedAvg(**COMMON))
    outer = WRAPPERS[wrapper](inner)
    result = outer.start(grid_for(wrapper), inner.initial_arrays(), num_rounds=3)
    found = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    assert nothing_dropped(inner) and close(expected, found)
    assert inner.ledger.total(kind="update", direction="up") > 0


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name in MODS])
def test_clients_that_clip_need_to_see_the_values(wrapper: str) -> None:
    with pytest.raises(ConfigError, match="hides the values from the clipping"):
        wrap(WRAPPERS[wrapper](FedAvg(**COMMON)), codec="int8")


def test_a_wrapper_outside_that_reads_encoded_values_changes_nothing() -> None:
    """Server-side clipping outside sees int8 as if they were values: what it makes of them is refused."""
    inner = wrap(FedAvg(**COMMON), codec="int8")
    outer = WRAPPERS["server fixed"](inner)
    result = outer.start(grid_for(codec_reference=dict(FIRST)), inner.initial_arrays(), num_rounds=1)
    assert not result.arrays and inner.history[0].skipped
    assert "has dtype 'float32', expected int8" in inner.history[0].dropped[0].reason


def test_the_adaptive_norm_is_part_of_the_state_and_really_adapts() -> None:
    base = WRAPPERS["server adaptive"](FedAvg(**COMMON))
    run(wrap(base), grid_for("server adaptive"), 3)
    # all seven are clipped in every round; Flower counts the clipped ones, so each round is exp(-0.2 * (1 - 0.5))
    assert base.clipping_norm == pytest.approx(0.5 * np.exp(-0.2 * 0.5) ** 3)  # type: ignore[attr-defined]


def test_replies_that_fail_don_t_cost_a_privacy_wrapper_its_round() -> None:
    """Alone, Flower's wrapper skips a whole round for one error reply; here it gets the good ones."""

    def tamper(reply: Message) -> Message | None:
        named = reply.metadata.message_type == "train" and reply.content["config"].get("client") == "c"
        return None if named else reply

    strategy = wrap(WRAPPERS["server fixed"](FedAvg(**COMMON)))
    grid = grid_for()
    grid.tamper = tamper
    assert not close(run(strategy, grid), FIRST, atol=1e-3)
    assert sum("train_loss" in metrics for metrics in strategy.history[1].clients.values()) == SITES - 1


def test_all_replies_bad_under_a_privacy_wrapper() -> None:
    # Flower alone divides by zero in the adaptive wrapper, and ends with empty arrays in the fixed one (fault 29).
    for wrapper in WRAPPERS:
        strategy = wrap(WRAPPERS[wrapper](FedAvg(**COMMON)))
        grid = grid_for(wrapper)
        grid.tamper = lambda reply: None if reply.metadata.message_type == "train" else reply
        assert close(run(strategy, grid, 2), FIRST, atol=0)


def test_a_spent_privacy_budget_ends_the_run_in_good_order() -> None:
    class Spent(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterator[Message]:
            if server_round == 3:
                raise PrivacyBudgetExhausted("the next private release would exceed max_epsilon")
            return super().configure_train(server_round, arrays, config, grid)  # type: ignore[return-value]

    strategy = wrap(Spent(**COMMON))
    found = run(strategy, grid_for(), 5)
    assert [record.round for record in strategy.history] == [0, 1, 2]
    assert close(found, run(wrap(FedAvg(**COMMON)), grid_for(), 2))


def test_every_strategy_that_flower_ships_is_in_the_matrix() -> None:
    trees = {"FedXgbBagging", "FedXgbCyclic"}  # boosted trees aren't arrays of an adapter
    names = {n for n in flower.__all__ if not n.startswith("DifferentialPrivacy")} - {"Strategy", "Result"} - trees
    assert names == set(STRATEGIES)
    assert len([n for n in flower.__all__ if n.startswith("DifferentialPrivacy")]) == len(WRAPPERS)
