"""Which strategies work with replies that are folded in one by one, and what is said to the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.errors import ConfigError
from offsite_fl.strategies.named import STRATEGIES
from offsite_fl.strategies.streaming import is_of_mean
from tests.flower_fakes import all_nodes

from .conftest import wrap

COMMON = {**all_nodes(5), "fraction_evaluate": 0.0}
CAN = {
    "fedavg", "fedavgm", "fedprox", "fedadam", "fedadagrad", "fedyogi", "fedper", "ditto", "fedot", "fedbiot", "flora",
    "ffa-lora", "rolora",
}  # fmt: skip
CANNOT = {
    "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg", "scaffold", "fednova", "flexlora"
}  # fmt: skip


def test_which_can() -> None:
    found = {name for name in STRATEGIES if is_of_mean(STRATEGIES[name])}  # type: ignore[arg-type]
    assert found == CAN and set(STRATEGIES) - found == CANNOT  # a new one says here what it is


@pytest.mark.parametrize(
    "base",
    [
        flower.FedMedian(**COMMON),
        flower.FedTrimmedAvg(**COMMON),
        flower.Krum(**COMMON),
        flower.MultiKrum(**COMMON),
        flower.Bulyan(**COMMON),
        flower.QFedAvg(client_learning_rate=0.1, **COMMON),
    ],
    ids=lambda base: type(base).__name__,
)
def test_the_others_are_refused_with_the_list_of_those_that_can(base: Strategy) -> None:
    with pytest.raises(ConfigError, match=f"{type(base).__name__} needs all replies") as caught:
        wrap(base, streaming=True)
    listed = str(caught.value).partition("these can: ")[2].partition(", and classes")[0]
    assert set(listed.split(", ")) >= CAN and not set(listed.split(", ")) & CANNOT


def test_a_promise_is_not_inherited_by_a_class_that_aggregates_otherwise() -> None:
    class Mine(Strategy):
        of_mean = True

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            """Whatever."""

    class Other(Mine):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            """Whatever else."""

    class Same(Mine):
        """Only chooses other nodes."""

    class Picky(FedAvg):
        """Only chooses other nodes."""

    assert is_of_mean(Mine) and is_of_mean(Same) and is_of_mean(Picky) and not is_of_mean(Other)
    assert not is_of_mean(type("Falsely", (flower.Krum,), {"of_mean": True}))


@pytest.mark.parametrize("bound", [{"max_norm_ratio": 2.0}, {"min_cosine": 0.0}])
def test_bounds_that_compare_replies_are_refused(bound: dict[str, float]) -> None:
    name = next(iter(bound)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"{name} can't go with streaming"):
        wrap(FedAvg(), streaming=True, **bound)
