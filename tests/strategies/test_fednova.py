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
from tests.flower_fakes import Adder, FakeGrid

from .conftest import FIRST, all_nodes, run, sites, wrap
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


@pytest.mark.parametrize("metrics", [{}, {"steps": 0.0}, {"lr_sum": -1.0}])
def test_replies_that_do_not_tell_their_work_skip_the_round(metrics: dict[str, float]) -> None:
    client = telling(a={"by": 1, **metrics}, b={"by": 2, **metrics})
    strategy = wrap(fednova())
    assert shift(run(strategy, FakeGrid(client, sites(2)))) == 0 and strategy.history[1].skipped
    assert "FedNova couldn't aggregate" in strategy.history[1].dropped[0].reason


def test_inside_a_privacy_wrapper() -> None:
    # The norm of a shift of 1 of five values is sqrt(5); clipped to 1 each value moves by 1 / sqrt(5).
    base = DifferentialPrivacyServerSideFixedClipping(fednova(), 0.0, 1.0, 2)
    client = telling(a={"by": 1, "steps": 3}, b={"by": 1, "steps": 3})
    assert shift(run(wrap(base), FakeGrid(client, sites(2)))) == pytest.approx(5**-0.5, abs=1e-3)


def test_by_name() -> None:
    assert isinstance(make_strategy("fednova:fraction-train=0.5"), FedNova)
