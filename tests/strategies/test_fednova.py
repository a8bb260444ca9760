"""FedNova: the normalised average by hand, and no pull towards sites that take more steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from offsite_fl.strategies import FedNova
from offsite_fl.strategies.named import make_strategy
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap
from .quadratics import Quadratics, far, quadratic_sites

LR = 0.02
# Same curvature, minima at 0 and 1, but b takes ten steps for each of a's.
UNEQUAL = quadratic_sites([1.0, 1.0], [0.0, 1.0], [1, 10])


def fednova(count: int = 2, **options: Any) -> FedNova:
    return FedNova(**{**all_nodes(count), "fraction_evaluate": 0.0, **options})


def telling(**metrics: dict[str, float]) -> Callable[[Message, Context], Message]:
    """Sites that add ``by`` to the adapter and report the rest of ``metrics`` of their name."""
    adder = Adder(lambda node, number: metrics[node["name"]]["by"])

    def client(message: Message, context: Context) -> Message:
        reply = adder(message, context)
        if message.metadata.message_type == "train":
            told = metrics[str(context.node_config["name"])]
            for name in told.keys() - {"by"}:
                reply.content["metrics"][name] = told[name]
        return reply

    return client


def shift(found: dict[str, torch.Tensor]) -> float:
    amounts = {round(float(value), 4) for name in found for value in (found[name] - FIRST[name]).flatten()}
    assert len(amounts) == 1
    return amounts.pop()


@pytest.mark.parametrize("metric", ["steps", "lr_sum"])
def test_one_round_by_hand(metric: str) -> None:
    # p = (1/4, 3/4), work = (2, 6): tau_eff = 1/2 + 9/2 = 5, and 5 * (1/4 * 1/2 + 3/4 * 9/6) = 6.25. FedAvg: 7.
    client = telling(a={"by": 1, metric: 2}, b={"by": 9, metric: 6})
    found = run(wrap(fednova()), FakeGrid(client, sites(2, [1, 3])))
    assert shift(found) == pytest.approx(6.25, abs=1e-4)


def test_learning_rates_win_over_steps_where_all_tell_them() -> None:
    # Equal work by lr_sum is FedAvg: (1 + 9) / 2.
    both = telling(a={"by": 1, "steps": 2, "lr_sum": 0.3}, b={"by": 9, "steps": 6, "lr_sum": 0.3})
    assert shift(run(wrap(fednova()), FakeGrid(both, sites(2)))) == pytest.approx(5, abs=1e-4)
    # c alone tells no lr_sum, so it is left out as the odd one of three, and the others count by lr_sum.
    some = telling(
        a={"by": 1, "steps": 2, "lr_sum": 0.3}, b={"by": 9, "steps": 6, "lr_sum": 0.3}, c={"by": 50, "steps": 1}
    )
    assert shift(run(wrap(fednova(3)), FakeGrid(some, sites(3)))) == pytest.approx(5, abs=1e-4)


def test_order_of_replies_and_a_single_site() -> None:
    orders = [dict(list(UNEQUAL.items())[::order]) for order in (1, -1)]
    one, other = (run(wrap(fednova()), FakeGrid(Quadratics(), nodes), 3) for nodes in orders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = run(wrap(fednova(1)), FakeGrid(telling(a={"by": 0.1, "steps": 7}), sites(1)))
    assert all(torch.equal(alone[name], FIRST[name] + 0.1) for name in alone)


def test_unequal_steps_do_not_move_the_optimum() -> None:
    """Fixed points: sum_i w_i (1 - 0.98^K_i) (x - m_i) = 0, w_i = 1 for FedAvg and 1 / K_i for FedNova."""
    plain = run(wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(2))), FakeGrid(Quadratics(LR), UNEQUAL), 70)
    pull = (1 - 0.98, 1 - 0.98**10)
    assert far(plain, pull[1] / sum(pull)) < 1e-2 and far(plain, 0.5) > 0.35
    found = run(wrap(fednova()), FakeGrid(Quadratics(LR), UNEQUAL), 90)
    rest = (pull[1] / 10) / (pull[0] + pull[1] / 10)
    assert far(found, rest) < 1e-3 and abs(rest - 0.5) < 0.025


@pytest.mark.parametrize("metrics", [{}, {"steps": 0.0}, {"lr_sum": -1.0}, {"lr_sum": float("nan")}])
def test_replies_that_do_not_tell_their_work_are_dropped_one_by_one(metrics: dict[str, float]) -> None:
    client = telling(a={"by": 1, **metrics}, b={"by": 2, "lr_sum": 0.1, "steps": 3.0})
    strategy = wrap(fednova())
    assert shift(run(strategy, FakeGrid(client, sites(2)))) == pytest.approx(2, abs=1e-4)
    (dropped,) = strategy.history[1].dropped
    assert dropped.node == "a" and ("work" in dropped.reason or "must be one finite number" in dropped.reason)


@pytest.mark.parametrize("claim", [1e-300, 1e-7, 0.0299, 3.01, 1e12, 1e300])
def test_a_claimed_work_far_from_the_others_is_dropped(claim: float) -> None:
    client = telling(a={"by": -1, "lr_sum": claim}, b={"by": 2, "lr_sum": 0.3}, c={"by": 4, "lr_sum": 0.3})
    strategy = wrap(fednova(3), max_update_norm=10.0)
    assert shift(run(strategy, FakeGrid(client, sites(3)))) == pytest.approx(3, abs=1e-4)
    (dropped,) = strategy.history[1].dropped
    assert dropped.node == "a" and "10 times the round's median 0.3, up or down" in dropped.reason


def test_honest_sites_of_unequal_work_all_count() -> None:
    # work 0.1, 0.3, 2: p = 1/3 each, tau = 0.8, so 0.8 / 3 * (1 / 0.1 + 3 / 0.3 + 20 / 2) = 8.
    client = telling(a={"by": 1, "lr_sum": 0.1}, b={"by": 3, "lr_sum": 0.3}, c={"by": 20, "lr_sum": 2.0})
    strategy = wrap(fednova(3))
    assert shift(run(strategy, FakeGrid(client, sites(3)))) == pytest.approx(8, abs=1e-3)
    assert not strategy.history[1].dropped
    narrow = wrap(fednova(3, work_factor=2.0))
    run(narrow, FakeGrid(client, sites(3)))
    assert {dropped.node for dropped in narrow.history[1].dropped} == {"a", "c"}


def test_of_two_replies_nobody_can_say_which_one_is_right() -> None:
    client = telling(a={"by": -1, "lr_sum": 1e-7}, b={"by": 2, "lr_sum": 0.3})
    strategy = wrap(fednova())
    assert shift(run(strategy, FakeGrid(client, sites(2)))) == 0 and strategy.history[1].skipped
    assert {dropped.node for dropped in strategy.history[1].dropped} == {"a", "b", "aggregate"}


def test_inside_a_privacy_wrapper() -> None:
    # The norm of a shift of 1 of five values is sqrt(5); clipped to 1 each value moves by 1 / sqrt(5).
    base = DifferentialPrivacyServerSideFixedClipping(fednova(), 0.0, 1.0, 2)
    client = telling(a={"by": 1, "steps": 3}, b={"by": 1, "steps": 3})
    assert shift(run(wrap(base), FakeGrid(client, sites(2)))) == pytest.approx(5**-0.5, abs=1e-3)


def test_by_name() -> None:
    made = make_strategy("fednova:fraction-train=0.5,work-factor=4")
    assert isinstance(made, FedNova) and (made.fraction_train, made.work_factor) == (0.5, 4.0)
