"""The benchmark of aggregation takes the same mean in each of its ways, and its table has the right ratios."""

from __future__ import annotations

import tracemalloc

import pytest
from rich.console import Console

from simulations.benchmarks.aggregation_memory import WAYS, one_round, table_of


@pytest.mark.parametrize("way", WAYS)
def test_each_way_takes_the_mean(way: str) -> None:
    found = one_round(way, clients=5, megabytes=0.01)
    assert found["off"] < 1e-5 and 0 < found["before"] <= found["peak"]


def most_traced(way: str, clients: int) -> float:
    """Megabytes of arrays at once in a round of 2 MB replies; the mean's sums are torch's and aren't among them."""
    tracemalloc.start()
    try:
        one_round(way, clients, 2.0)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_memory_grows_with_the_clients_unless_replies_are_folded_in() -> None:
    growth = {way: most_traced(way, 14) - most_traced(way, 4) for way in WAYS}
    assert growth["streaming"] < 1.0  # half of one reply
    assert min(growth["all at once"], growth["Flower's FedAvg"]) > 18.0  # nine of the ten more


def test_ratios_are_to_the_first_row() -> None:
    rows = {8: {"before": 100.0, "peak": 300.0, "off": 0.0}, 64: {"before": 100.0, "peak": 750.0, "off": 0.0}}
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table_of({"a way": rows}, 50.0))
    last = [line for line in captured.get().splitlines() if "64" in line][-1]
    assert "650" in last and "2.50" in last and "3.25" in last
