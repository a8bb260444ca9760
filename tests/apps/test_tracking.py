"""The run config's tracker: each round when it is over, and nothing where the run itself would be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offsite_fl.apps import RunPart, track, tracking_for
from offsite_fl.errors import CheckpointError, ConfigError
from offsite_fl.strategies import OffsiteTuning
from simulations.in_process import task_identity
from tests.flower_fakes import Adder, FakeGrid, all_nodes
from tests.strategies.conftest import StubOwner, sites


def part(folder: Path, tracker: str = "tensorboard", resume: bool = False) -> RunPart:
    return RunPart(str(folder), resume, 3, False, tracker)


def federate(run: RunPart, rounds: int) -> None:
    tracking = tracking_for(run, {"seed": 1})
    strategy = OffsiteTuning(FedAvg(**all_nodes(2)), StubOwner(), run_dir=run.folder, resume=run.resume)  # type: ignore[arg-type]
    track(strategy, tracking)
    with task_identity():
        strategy.start(
            FakeGrid(Adder(lambda node, r: 1.0), sites(2)),
            num_rounds=rounds,
            evaluate_fn=lambda r, arrays: MetricRecord({"plug_in_loss": 5.0 - r}),
        )
    tracking.close()


def test_rounds_come_as_they_end_and_a_resumed_run_adds_its_own(tmp_path: Path) -> None:
    federate(part(tmp_path / "run"), 1)
    federate(part(tmp_path / "run", resume=True), 2)
    # Two files of one process and one second don't lie in the order in which they were written.
    held = EventAccumulator(str(tmp_path / "run" / "tracking" / "run"), purge_orphaned_data=False)
    held.Reload()
    assert sorted((e.step, e.value) for e in held.Scalars("plug-in/loss")) == [(0, 5.0), (1, 4.0), (2, 3.0)]
    assert sorted(e.step for e in held.Scalars("bytes/up")) == [1, 2] and held.Scalars("bytes/up")[0].value > 0
    assert [e.value for e in held.Scalars("replies/good")] == [2.0, 2.0]


def test_nothing_is_written_for_a_run_that_is_refused(tmp_path: Path) -> None:
    federate(part(tmp_path / "run", tracker=""), 1)
    with pytest.raises(CheckpointError, match="holds a run of 1 rounds"):
        tracking_for(part(tmp_path / "run"), {})
    with pytest.raises(ConfigError, match="unknown tracker"):
        tracking_for(part(tmp_path / "other", "wandb"), {})
    assert not (tmp_path / "run" / "tracking").exists() and not (tmp_path / "other").exists()
