"""Memory of the server in one round: replies folded in as they come, all at once, and in Flower's own FedAvg.

    python -m simulations.benchmarks.aggregation_memory --clients 8 64 --megabytes 50

Each row is a whole round in a process of its own, on a grid that makes a client's reply when it is fetched: what the
process holds beyond one reply, its server holds. Peaks are the operating system's (``getrusage``); the process at rest,
with its libraries and the adapter to begin with, is given beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from rich.console import Console
from rich.table import Table

from offsite_fl.strategies import OffsiteTuning
from offsite_fl.wire import names
from simulations.in_process import InProcessGrid, task_identity

TENSORS = 12
WAYS = ("streaming", "all at once", "Flower's FedAvg")
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in getrusage's unit


@dataclass
class Given:
    """An adapter of equal tensors without any model, in place of both the owner and its bundle."""

    megabytes: float
    digest: str = "0" * 64
    total_bytes: int = 0
    values: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        count = int(self.megabytes * 1e6 / 4 / TENSORS)
        self.values = {f"adapter.{i}.weight": torch.linspace(-1.0, 1.0, count) for i in range(TENSORS)}

    @property
    def bundle(self) -> Given:
        """Itself: nothing of it is sent, all clients have it."""
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter."""
        return self.values

    def initial_state(self, lora: object = None, seed: int = 0) -> dict[str, torch.Tensor]:
        """The adapter."""
        return self.values


def client(message: Message, context: Context) -> Message:
    """Has the bundle, and gives the adapter back with its number added to each value."""
    if message.metadata.message_type == names.QUERY_BUNDLE:
        return Message(RecordDict({names.CONFIG: ConfigRecord({names.HELD: True})}), reply_to=message)
    number = int(context.node_config["partition-id"])
    arrays = message.content[names.ARRAYS]
    moved = {name: Array(array.numpy() + np.float32(number)) for name, array in arrays.items()}  # type: ignore[union-attr]
    metrics = MetricRecord({names.NUM_EXAMPLES: 1 + number, "train_loss": 1.0})
    return Message(RecordDict({names.ARRAYS: ArrayRecord(moved), names.METRICS: metrics}), reply_to=message)


def strategy_of(way: str, given: Given, clients: int) -> Strategy:
    """What aggregates, without evaluation."""
    options: dict[str, Any] = {"min_train_nodes": clients, "min_available_nodes": clients, "fraction_evaluate": 0.0}
    if way == WAYS[2]:
        return FedAvg(**options)
    return OffsiteTuning(FedAvg(**options), given, given, streaming=way == WAYS[0])  # type: ignore[arg-type]


def peak() -> float:
    """Megabytes that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e6


def one_round(way: str, clients: int, megabytes: float) -> dict[str, float]:
    """Run it in this process; megabytes before and at the peak, and how far the mean is off at most."""
    given = Given(megabytes)
    grid = InProcessGrid.of_partitions(client, [f"site-{i}" for i in range(clients)])
    with task_identity():
        strategy, begin = strategy_of(way, given, clients), ArrayRecord(given.values)
        before = peak()
        result = strategy.start(grid, begin, num_rounds=1)
        highest = peak()
    weights = range(1, clients + 1)
    shift = sum(weight * (weight - 1) for weight in weights) / sum(weights)
    off = max(
        float((torch.from_numpy(result.arrays[name].numpy().copy()).double() - value.double() - shift).abs().max())
        for name, value in given.values.items()
    )
    return {"before": before, "peak": highest, "off": off}


def in_a_process(way: str, clients: int, megabytes: float) -> dict[str, float]:
    """:func:`one_round` in a new process, so that no peak is another row's."""
    arguments = ["--one", way, "--clients", str(clients), "--megabytes", str(megabytes)]
    command = [sys.executable, "-m", "simulations.benchmarks.aggregation_memory", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table_of(found: dict[str, dict[int, dict[str, float]]], megabytes: float) -> Table:
    """Peaks, and how they grow from the fewest clients to the most."""
    table = Table(title=f"Megabytes of a server whose clients return {megabytes:g} MB each")
    for name in ("aggregation", "clients", "at rest", "peak", "peak above rest", "peak / first", "above rest / first"):
        table.add_column(name, justify="right", no_wrap=True)
    for way, rows in found.items():
        first = next(iter(rows.values()))
        for clients, row in rows.items():
            above, lowest = row["peak"] - row["before"], first["peak"] - first["before"]
            ratios = (f"{row['peak'] / first['peak']:.2f}", f"{above / lowest:.2f}")
            table.add_row(way, str(clients), *(f"{n:,.0f}" for n in (row["before"], row["peak"], above)), *ratios)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.aggregation_memory", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--megabytes", type=float, default=50.0, help="of one reply's adapter, fp32")
    parser.add_argument("--one", choices=WAYS, help="one row in this process, as JSON")
    given = parser.parse_args(arguments)
    console = Console()
    if given.one is not None:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        console.print_json(json.dumps(one_round(given.one, given.clients[0], given.megabytes)), indent=None)
        return 0
    found = {way: {count: in_a_process(way, count, given.megabytes) for count in given.clients} for way in WAYS}
    console.print(table_of(found, given.megabytes))
    worst = max(row["off"] for rows in found.values() for row in rows.values())
    console.print(f"All means are right to {worst:.1g}.", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
