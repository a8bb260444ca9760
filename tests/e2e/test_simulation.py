"""The quickstart on simulated nodes: the report, the cache, and a run that was stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offsite_fl.config import CACHE_VARIABLE
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS
from offsite_fl.repair import Repair
from offsite_fl.update import Update
from simulations.local_flower import LocalFlower, local_flower
from tests.e2e.conftest import APP, OWNERS, PATIENCE, SETTINGS, running, write_data, write_model


def run(flower: LocalFlower, ground: Path, name: str, **more: object) -> RunReport:
    """A run of the quickstart into the folder ``name``; both owners must have been in each of its rounds."""
    folder = ground / name
    settings = {"model": ground / "model", "data.folder": ground / "data", "run.folder": folder}
    assert flower.run(APP, SETTINGS | settings | more, timeout=PATIENCE) == 0
    report = RunReport.read(folder)
    for entry in report.rounds[1:]:
        assert set(entry.clients) == set(OWNERS)
        assert not entry.dropped and not entry.skipped
    return report


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(ground / "cache"))  # simulated nodes share one
    write_model(ground / "model")
    write_data(ground / "data")
    with local_flower(ground / "flower", supernodes=len(OWNERS)) as flower:
        whole = run(flower, ground, "whole", **{"repair.run": True, "run.tracker": "tensorboard"})
        assert any("flower-superlink" in line for line in running(ground))  # it can be found while it runs
        half = run(flower, ground, "halves", **{"num-server-rounds": 1})
        halves = run(flower, ground, "halves", **{"run.resume": True, "repair.run": True})
        run(flower, ground, "streamed", **{"streaming": True, "round-deadline": PATIENCE, "quorum": len(OWNERS)})

    assert [key for key, _ in whole.rows] == list(ROW_KEYS)
    assert [len(report.rounds) for report in (whole, half, halves)] == [1 + 2, 1 + 1, 1 + 2]
    page = (ground / "whole" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "full fine-tuning" in page

    tracked = EventAccumulator(str(ground / "whole" / "tracking" / "whole"))
    tracked.Reload()
    curve = [entry.plug_in.loss for entry in whole.rounds if entry.plug_in is not None]
    assert [event.value for event in tracked.Scalars("plug-in/loss")] == pytest.approx(curve) and len(curve) == 1 + 2
    assert tracked.Scalars("rows/plug_in/loss")[0].value == pytest.approx(whole.rows.plug_in.loss)

    assert whole.ledger.total(round=1, kind="bundle") > 0
    assert whole.ledger.total(round=2, kind="bundle") == 0
    # Other runs, the same bundle: the nodes have it already.
    assert half.ledger.total(kind="bundle") == halves.ledger.total(kind="bundle") == 0

    assert halves.rows.plug_in == whole.rows.plug_in != half.rows.plug_in
    # The row is that of the repaired plug-in, the curve's last point that of the plug-in as it came.
    assert whole.rounds[-1].plug_in != whole.rows.plug_in and half.rounds[-1].plug_in == half.rows.plug_in
    assert Repair.load(ground / "whole" / "repair.safetensors").steps > 0
    assert any("repair" in note for note in whole.notes) and not any("repair" in note for note in half.notes)
    tensors, resumed = (Update.load(ground / name / "update.safetensors").tensors for name in ("whole", "halves"))
    assert tensors.keys() == resumed.keys()
    assert all(torch.equal(tensors[name], resumed[name]) for name in tensors)
    streamed = Update.load(ground / "streamed" / "update.safetensors").tensors  # over Flower's own push and pull
    assert all(torch.allclose(tensors[name], streamed[name], rtol=1e-4, atol=1e-5) for name in tensors)
