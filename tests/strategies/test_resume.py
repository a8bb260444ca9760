"""Rounds 1-4 at once equal rounds 1-2, stop, resume 3-4, bit for bit; a damaged or foreign checkpoint says so."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)

from offsite_fl.config import TuneConfig
from offsite_fl.errors import CheckpointError
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.checkpoint import Checkpoint, existing, latest
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import StubOwner, run, sites, wrap

PART = {"fraction_train": 0.5, "min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 4}
BASES: dict[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(**PART),  # two of four nodes: sampling must go on from the same random state
    "fedavgm": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9, **all_nodes(4)),
    "fedadam": lambda: FedAdam(eta=0.1, **PART),
    "fedyogi": lambda: FedYogi(eta=0.1, **all_nodes(4)),
    "dp adaptive": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(**all_nodes(4)), 0.1, 4, initial_clipping_norm=0.5, clipped_count_stddev=0.5
    ),
}


def noise(node: dict[str, Any], server_round: int) -> float:
    return float(np.random.default_rng([node["index"], server_round]).normal())


def make(base: str, folder: Path | None, **options: Any) -> OffsiteTuning:
    return wrap(BASES[base](), run_dir=folder, **options)


def seed() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def grid() -> FakeGrid:
    return FakeGrid(Adder(noise), sites(4, [3, 1, 4, 1]))


@pytest.mark.parametrize("base", BASES)
def test_resumed_rounds_equal_uninterrupted_ones(base: str, tmp_path: Path) -> None:
    seed()
    whole = make(base, tmp_path / "whole")
    expected = run(whole, grid(), 4)
    seed()
    run(make(base, tmp_path / "parts"), grid(), 2)
    seed()  # a new process begins with other random numbers than the old one had left
    torch.rand(3), random.random()
    second = make(base, tmp_path / "parts", resume=True)
    found = run(second, grid(), 4)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [r.clients for r in second.history] == [r.clients for r in whole.history]
    assert second.ledger.total(kind="update") == whole.ledger.total(kind="update")
    one, other = (latest(tmp_path / name) for name in ("whole", "parts"))
    assert one is not None and other is not None and one.rng == other.rng
    assert one.arrays.keys() == other.arrays.keys()
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_metrics_come_back_too(tmp_path: Path) -> None:
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"plug_in_loss": 1.0 / (1 + server_round), "counts": [1, 2]})

    make("fedavg", tmp_path).start(grid(), num_rounds=2, evaluate_fn=evaluate)
    resumed = make("fedavg", tmp_path, resume=True)
    result = resumed.start(grid(), num_rounds=3, evaluate_fn=evaluate)
    assert [m["plug_in_loss"] for m in result.evaluate_metrics_serverapp.values()] == [1.0, 0.5, 1 / 3, 0.25]
    assert result.evaluate_metrics_serverapp[0]["counts"] == [1, 2]
    assert list(result.train_metrics_clientapp) == [1, 2, 3] == list(result.evaluate_metrics_clientapp)
    assert [r.plug_in.loss for r in resumed.history if r.plug_in] == [1.0, 0.5, 1 / 3, 0.25]


def test_a_run_that_stopped_in_its_evaluation_does_that_first(tmp_path: Path) -> None:
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 2 and not resuming:
            raise KeyboardInterrupt
        return MetricRecord({"plug_in_loss": float(server_round)})

    resuming = False
    with pytest.raises(KeyboardInterrupt):
        make("fedadam", tmp_path).start(grid(), num_rounds=3, evaluate_fn=evaluate)
    stopped = latest(tmp_path)
    assert stopped is not None and (stopped.round, stopped.phase) == (2, "trained")
    resuming = True
    train_before = grid()
    result = make("fedadam", tmp_path, resume=True).start(train_before, num_rounds=2, evaluate_fn=evaluate)
    assert not train_before.types("train") and train_before.types("evaluate")
    assert result.evaluate_metrics_serverapp[2]["plug_in_loss"] == 2.0


def test_a_finished_run_resumed_does_nothing(tmp_path: Path) -> None:
    expected = run(make("fedavg", tmp_path), grid(), 2)
    idle = grid()
    found = run(make("fedavg", tmp_path, resume=True), idle, 2)
    assert not idle.log and all(torch.equal(expected[name], found[name]) for name in expected)


def test_resume_without_a_checkpoint_begins_at_the_beginning(tmp_path: Path) -> None:
    assert len(run(make("fedavg", tmp_path, resume=True), grid(), 1)) == 2


def test_a_folder_with_a_run_isn_t_overwritten(tmp_path: Path) -> None:
    run(make("fedavg", tmp_path), grid(), 1)
    with pytest.raises(CheckpointError, match="holds a run of 1 rounds"):
        run(make("fedavg", tmp_path), grid(), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "fp16"}, "codec was 'fp32' and is 'fp16'"),
        ({"tune": TuneConfig(lr=0.5)}, r"tune\.lr was 0.0001 and is 0.5"),
        ({"min_results": 2}, "min-results was 1 and is 2"),
        ({"max_update_norm": 3.0}, "max-update-norm was None and is 3.0"),
        ({"base": FedAdam(**PART)}, r"base\.class was 'FedAvg' and is 'FedAdam'"),
        ({"base": FedAvg(**{**PART, "fraction_train": 1.0})}, r"base\.fraction_train was 0.5 and is 1.0"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(make("fedavg", tmp_path), grid(), 1)
    options = {"run_dir": tmp_path, "resume": True, **change}
    strategy = wrap(options.pop("base", None) or BASES["fedavg"](), **options)
    with pytest.raises(CheckpointError, match=message):
        run(strategy, grid(), 2)


def test_another_bundle_is_refused_and_free_settings_may_change(tmp_path: Path) -> None:
    run(make("fedavg", tmp_path), grid(), 1)
    owner = StubOwner()
    owner.bundle.digest = "e" * 64
    with pytest.raises(CheckpointError, match="digest was 'ddd"):
        OffsiteTuning(BASES["fedavg"](), owner, run_dir=tmp_path, resume=True).start(grid(), num_rounds=2)  # type: ignore[arg-type]
    run(make("fedavg", tmp_path, resume=True, tune=TuneConfig(device="cpu", progress=False)), grid(), 2)


def test_damage_is_noticed(tmp_path: Path) -> None:
    run(make("fedavg", tmp_path), grid(), 1)
    arrays = tmp_path / "checkpoints" / "round-001" / "state.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match="isn't what was written"):
        run(make("fedavg", tmp_path, resume=True), grid(), 2)
    (arrays.parent / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        latest(tmp_path)
    arrays.unlink()
    (arrays.parent / "state.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="another format"):
        latest(tmp_path)


def test_only_the_latest_are_kept_and_a_broken_write_leaves_nothing(tmp_path: Path) -> None:
    run(make("fedavg", tmp_path, keep_checkpoints=2), grid(), 4)
    assert existing(tmp_path) == [3, 4]
    broken = Checkpoint(5, "trained", {"x": object()}, {}, {}, arrays={"a": np.ones(2)})
    with pytest.raises(TypeError):
        broken.save(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["round-003", "round-004"]
    run(make("fedavg", tmp_path, resume=True, keep_checkpoints=None), grid(), 6)
    assert existing(tmp_path) == [3, 4, 5, 6]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    run(make("dp adaptive", tmp_path), grid(), 1)
    files = {path.name for path in (tmp_path / "checkpoints" / "round-001").iterdir()}
    assert files == {"state.json", "state.safetensors"}
