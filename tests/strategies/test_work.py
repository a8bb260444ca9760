"""What replies may say of their work, by hand."""

from __future__ import annotations

import pytest
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from offsite_fl.errors import ConfigError, WireError
from offsite_fl.strategies import FedNova, Scaffold
from offsite_fl.strategies.work import Work

BOTH = Work(("lr_sum", "steps"), 10.0)


def told(*values: float, key: str = "lr_sum") -> dict[int, dict[str, float]]:
    return {node: {key: value} for node, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ((1.0,), set()),
        ((1.0, 10.0), set()),
        ((1.0, 10.1), {0, 1}),  # nobody can say which one is right
        ((1.0, 1.0, 10.0), set()),
        ((1.0, 1.0, 10.1), {2}),
        ((1.0, 1.0, 0.1), set()),
        ((1.0, 1.0, 0.099), {2}),
        ((1e-7, 1.0, 2.0, 3.0, 1e12), {0, 4}),
        ((1e-7, 1.0, 1.0, 1.0), {0}),
        ((5e-324, 1e308, 1e308), {0}),
    ],
)
def test_ten_times_the_median_up_or_down(values: tuple[float, ...], odd: set[int]) -> None:
    assert BOTH.odd(told(*values)).keys() == odd


def test_the_first_key_that_all_have_counts() -> None:
    metrics = told(1.0, 1.0, 1.0, key="steps")
    assert not BOTH.odd({**metrics, 0: {"steps": 1.0, "lr_sum": 1e9}})
    assert BOTH.odd({node: {**each, "lr_sum": [1.0, 1.0, 1e9][node]} for node, each in metrics.items()}).keys() == {2}


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({}, "needs the metric 'lr_sum' or 'steps'"),
        ({"lr_sum": 0.0}, "'lr_sum' is 0.0"),
        ({"lr_sum": 0.1, "steps": -1}, "'steps' is -1"),
    ],
)
def test_one_reply_alone(metrics: dict[str, float], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        BOTH.check(metrics)
    BOTH.check({"steps": 1.0})


def test_which_strategies_have_it() -> None:
    assert Work.of(FedAvg()) is None
    assert Work.of(Scaffold(work_factor=3.0)) == Work(("lr_sum",), 3.0)
    wrapped = DifferentialPrivacyServerSideFixedClipping(FedNova(), 0.0, 1.0, 2)
    assert Work.of(wrapped) == BOTH
    for factor in (0.5, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="work-factor must be a finite number from 1"):
            FedNova(work_factor=factor)
