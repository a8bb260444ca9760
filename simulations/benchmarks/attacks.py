"""What one malicious data owner of five costs under each way to aggregate: a table of plug-in losses.

    python -m simulations.benchmarks.attacks --out runs/attacks.jsonl

The pico model (``make pico``), five data owners with parts of the Bible of their own, few rounds, in this process. Each
cell is the mean plug-in loss over the seeds, in nats per token on held-out text of all owners; lower is better. Cells
that stand in ``--out`` aren't run again, so it can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.lines import append_line, read_lines
from simulations.benchmarks.attack_world import World

console = Console()

# Who does nothing else than train first: what a strategy costs without any attack.
ATTACKS = (
    "",
    "sign-flip",
    "sign-flip+scale:factor=10",
    "scale:factor=10",
    "noise:std=10",
    "label-flip",
    "free-rider",
    "nan",
    "wrong-shape",
)


@dataclass(frozen=True)
class Way:
    """One column: a base strategy and options of the wrapper."""

    name: str
    base: str = "fedavg"
    options: dict[str, float] = field(default_factory=dict)


# In an order in which runs that come to the same replies follow each other. Bulyan isn't here: it needs seven.
WAYS = (
    Way("FedAvg"),
    Way("max-norm-ratio 2", options={"max_norm_ratio": 2.0}),
    Way("min-cosine 0", options={"min_cosine": 0.0}),
    Way("both", options={"max_norm_ratio": 2.0, "min_cosine": 0.0}),
    Way("clip-update-norm 10", options={"clip_update_norm": 10.0}),  # honest updates are 8 long in the first round
    Way("median", "fedmedian"),
    Way("trimmed mean", "fedtrimmedavg:beta=0.2"),
    Way("Krum", "krum:num-malicious-nodes=1"),
    Way("MultiKrum", "multikrum:num-malicious-nodes=1,num-nodes-to-select=3"),
)


@dataclass(frozen=True)
class Setup:
    """What all cells share. A cell of another setup in the file is another cell."""

    rounds: int
    steps: int
    test_tokens: int
    attacker: int


@dataclass(frozen=True)
class Cell:
    """One federation: its loss and how many of the attacker's and of the others' replies were left out."""

    setup: Setup
    seed: int
    attack: str
    way: str
    loss: float
    attacker_dropped: int = 0
    others_dropped: int = 0

    @property
    def key(self) -> str:
        """Which federation it is."""
        return key_of(self.setup, self.seed, self.attack, self.way)

    @property
    def error(self) -> None:
        """One that fails ends the benchmark, so there is none in the file."""

    def to_dict(self) -> dict[str, Any]:
        """A line of the file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: object) -> Cell:
        """Read what :meth:`to_dict` wrote."""
        found = checks.entries(value, "cell", ("setup", "seed", "attack", "way", "loss"), cls.__dataclass_fields__)
        return cls(**{**found, "setup": Setup(**checks.entries(found["setup"], "setup", Setup.__dataclass_fields__))})


def key_of(setup: Setup, seed: int, attack: str, way: str) -> str:
    """The name of a federation in the file."""
    return json.dumps([asdict(setup), seed, attack, way])


def read(path: Path) -> list[Cell]:
    """The cells of a file, a line of JSON each."""
    return read_lines(path, Cell.from_dict)


def missing(known: Iterable[Cell], setup: Setup, seed: int) -> list[tuple[Way, str]]:
    """What is still to run with a seed."""
    keys = {cell.key for cell in known}
    return [(way, attack) for way in WAYS for attack in ATTACKS if key_of(setup, seed, attack, way.name) not in keys]


def measure(world: World, setup: Setup, seed: int, way: Way, attack: str) -> Cell:
    """Run one federation."""
    strategy = world.run(attack, way.base, way.options)
    for record in strategy.history:
        if record.skipped:  # then the number would be that of another experiment
            raise OffsiteError(
                f"{way.name}, {attack or 'none'}: round {record.round} came to nothing: {record.dropped}"
            )
    dropped = [reply.node for record in strategy.history for reply in record.dropped]
    own = dropped.count(world.attacker_name)
    return Cell(setup, seed, attack, way.name, world.loss(strategy), own, len(dropped) - own)


def fill(path: Path, setup: Setup, seed: int, workdir: Path) -> None:
    """Run what is missing and write each cell as soon as it is there."""
    todo = missing(read(path), setup, seed)
    if not todo:
        return
    world = World(workdir, seed, setup.rounds, setup.steps, setup.test_tokens, setup.attacker)
    if not any(cell.seed == seed and cell.setup == setup for cell in read(path)):
        console.print(f"seed {seed}: untuned {world.untuned():.3f}")
    for way, attack in todo:
        began = time.process_time()
        cell = measure(world, setup, seed, way, attack)
        append_line(path, cell)
        seconds = time.process_time() - began
        console.print(f"seed {seed}: {way.name}, {attack or 'none'}: {cell.loss:.3f} ({seconds:.1f} s of one core)")


def table(cells: Iterable[Cell], setup: Setup) -> str:
    """Markdown: a row an attack, a column a strategy, means over the seeds; a star where honest ones were dropped."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.setup == setup:
            found.setdefault((cell.attack, cell.way), []).append(cell)
    lines = ["| attack | " + " | ".join(way.name for way in WAYS) + " |", "|---|" + "---:|" * len(WAYS)]
    for attack in ATTACKS:
        shown = [_shown(found.get((attack, way.name), [])) for way in WAYS]
        lines.append(f"| {f'`{attack}`' if attack else 'none'} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(cells: list[Cell]) -> str:
    if not cells:
        return ""
    star = "*" if any(cell.others_dropped for cell in cells) else ""
    return f"{statistics.mean(cell.loss for cell in cells):.3f}{star}"


def spread(cells: Iterable[Cell], setup: Setup) -> float:
    """The largest half-range over the seeds of any cell without an attack: what differences mean nothing."""
    honest: dict[str, list[float]] = {}
    for cell in cells:
        if cell.setup == setup and not cell.attack:
            honest.setdefault(cell.way, []).append(cell.loss)
    return max((max(losses) - min(losses)) / 2 for losses in honest.values())


def main(arguments: list[str] | None = None) -> int:
    """Fill the file and print the table."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.attacks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/attacks.jsonl"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a data owner in a round")
    parser.add_argument("--test-tokens", type=int, default=4096)
    parser.add_argument("--attacker", type=int, default=0, help="partition id of the malicious data owner")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setup = Setup(given.rounds, given.steps, given.test_tokens, given.attacker)
    try:
        with tempfile.TemporaryDirectory() as workdir:
            for seed in range(given.seeds):
                fill(given.out, setup, seed, Path(workdir))
    except OffsiteError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    cells = read(given.out)
    console.print(table(cells, setup), markup=False, soft_wrap=True)
    console.print(f"half-range over {given.seeds} seeds without an attack: at most {spread(cells, setup):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
