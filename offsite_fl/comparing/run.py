"""The comparison from end to end: what is missing is measured, by one Flower run or several side by side."""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offsite_fl.comparing.bench import Bench
from offsite_fl.comparing.cells import Cell, cells
from offsite_fl.comparing.client_app import CACHE
from offsite_fl.comparing.division import divide, read_rows
from offsite_fl.comparing.fitting import check_attacks, check_strategies
from offsite_fl.comparing.local_flower import LocalFlower, local_flower, module_path, stop_group
from offsite_fl.comparing.places import Places
from offsite_fl.comparing.results import Measured
from offsite_fl.comparing.server_app import Plan
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.lines import LineStore, read_lines
from offsite_fl.evaluation.record import available_cores

APP = Path(__file__).parent / "app"
Watch = Callable[[Measured], None]


@dataclass(frozen=True)
class State:
    """A cell, its key, and what the folder holds of it."""

    key: str
    cell: Cell
    measured: Measured | None
    failed: Measured | None = None


class Comparison:
    """One grid in one folder. ``table`` are the tables of GRID.toml, see :func:`~.settings.read_grid`."""

    def __init__(self, table: dict[str, Any], out: Path) -> None:
        self.table, self.out = table, out.absolute()
        self.settings = GridSettings.of(table)
        self.store: LineStore[Measured] = LineStore(self.out / "cells.jsonl", Measured.from_dict)
        self._places: Places | None = None

    @property
    def places(self) -> Places:
        """Where things lie; the model is opened for it once, since keys depend on it."""
        if self._places is None:
            self._places = Bench(self.settings, self.out).places
        return self._places

    def states(self) -> list[State]:
        """Every cell of the grid with what is known of it, in the order in which they are measured."""
        found = []
        for cell in cells(self.settings):
            key = self.places.key(cell)
            found.append(State(key, cell, self.store.get(key), self.store.failed(key)))
        return found

    def run(self, parallel: int = 1, gpus_per_client: float = 0.0, watch: Watch | None = None) -> list[Measured]:
        """Measure what isn't there yet; everything that belongs to the grid, failed cells included.

        ``parallel`` Flower runs share the cores and the pending cells. ``watch`` is told of each cell as it comes in.
        An interruption loses the cells that were in work, one a run.
        """
        self._collect(None)  # of a run that was interrupted
        pending = [state for state in self.states() if state.measured is None]
        if pending:
            check_strategies(self.settings, self.places.inputs.depth)
            check_attacks(self.settings, Path.cwd())
            self._prepare([state.cell for state in pending])
            for shards in shards_of(pending, parallel):
                self._measure(shards, gpus_per_client, watch)
        return [found for state in self.states() if (found := state.measured or state.failed) is not None]

    def _prepare(self, wanted: Sequence[Cell]) -> None:
        """Bundles and clients' files, so that nothing is made twice by runs side by side."""
        bench = Bench(self.settings, self.out)
        for one in {bench.places.bundle(cell): cell for cell in wanted}.values():
            bench.make_bundle(one)
        rows = read_rows(self.settings.data)
        for cell in wanted:
            folder, condition = bench.places.data(cell), cell.condition
            if folder is not None and condition.partition is not None and condition.clients is not None:
                divide(rows, condition.partition, condition.clients, cell.seed, folder, self.places.inputs.rows)

    def _measure(self, shards: Sequence[Sequence[State]], gpus_per_client: float, watch: Watch | None) -> None:
        """One Flower run for each shard, side by side; all clients of a shard's cells are as many."""
        cores = max(1, available_cores() // len(shards))
        with contextlib.ExitStack() as stack:
            runs = []
            for number, shard in enumerate(shards):
                name = f"{number}-{uuid.uuid4().hex[:8]}"
                work = self.out / "work"
                clients = max((state.cell.condition.clients or 1) for state in shard)
                flower = stack.enter_context(
                    local_flower(
                        work / f"flower-{number}",
                        clients,
                        gpus_per_client=gpus_per_client,
                        cpus=cores,
                        environment=self._environment(number, gpus_per_client),
                    )
                )
                plan = Plan(
                    self.table, self.out, work / f"results-{name}.jsonl", cores, tuple((s.key, s.cell) for s in shard)
                )
                plan.write(work / f"plan-{name}.json")
                runs.append(stack.enter_context(_started(flower, work / f"plan-{name}.json", self.out, number)))
            while any(run.poll() is None for run in runs):
                self._collect(watch)
                time.sleep(0.5)
            self._collect(watch)
        lost = [state for shard in shards for state in shard if self._unknown(state)]
        if lost:
            codes = ", ".join(str(run.returncode) for run in runs)
            raise OffsiteError(
                f"flwr run ended (exit code {codes}) without {len(lost)} of its cells, the first of them "
                f"{lost[0].cell.label}; the reason is in {self.out / 'work'}/run-*.log. The same command goes on"
            )

    def _unknown(self, state: State) -> bool:
        return self.store.get(state.key) is None and self.store.failed(state.key) is None

    def _environment(self, number: int, gpus_per_client: float) -> dict[str, str]:
        # Clients run side by side, a thread each; the server, which measures while they wait, sets its own.
        found = {"OMP_NUM_THREADS": "1"}
        if any(self.settings.grid.attacks):
            found |= module_path(Path.cwd())  # where the package of attacks is looked for
        if gpus_per_client > 0 and (count := torch.cuda.device_count()) > 1:
            found["CUDA_VISIBLE_DEVICES"] = str(number % count)
        return found

    def _collect(self, watch: Watch | None) -> None:
        """Take over what the runs have written since. Each run has its own file, so no two write to one."""
        for path in sorted((self.out / "work").glob("results-*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if not whole:
                continue
            taken = path.with_suffix(".taken")
            taken.write_bytes(whole)
            for found in read_lines(taken, Measured.from_dict):
                if self.store.get(found.key) is None and not self._same_failure(found):
                    self.store.add(found)
                    if watch is not None:
                        watch(found)
            taken.unlink()

    def _same_failure(self, found: Measured) -> bool:
        known = self.store.failed(found.key)
        return known is not None and known.to_dict() == found.to_dict()


def shards_of(pending: Sequence[State], parallel: int) -> Iterator[list[list[State]]]:
    """Batches of shards. Within a batch all cells have the same number of clients, and shards run side by side.

    Cells that know no number of clients go with the first batch.
    """
    counts = list(dict.fromkeys(state.cell.condition.clients for state in pending if state.cell.condition.clients))
    first = counts[0] if counts else None
    batches: list[int | None] = [*counts] or [None]
    for count in batches:
        batch = [s for s in pending if s.cell.condition.clients == count or not s.cell.condition.clients]
        if count != first:
            batch = [s for s in batch if s.cell.condition.clients]
        shards = [batch[number::parallel] for number in range(parallel)]
        yield [shard for shard in shards if shard]


@contextlib.contextmanager
def _started(flower: LocalFlower, plan: Path, out: Path, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """``flwr run`` in the background, ended with everything it started; its output goes to work/run-<number>.log."""
    command = flower.command(APP, {"plan": plan, CACHE: out / "cache"})
    with (out / "work" / f"run-{number}.log").open("ab") as log:
        run = subprocess.Popen(command, env=dict(flower.environment), stdout=log, stderr=log, start_new_session=True)
    try:
        yield run
    finally:
        stop_group(run)
