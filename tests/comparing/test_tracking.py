"""Each measured cell is a run in the tracker: its settings, rounds and result."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offsite_fl.comparing import tracking
from offsite_fl.comparing.places import Inputs, Places
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.comparing.tracking import CellTracker, final_values, run_name, settings_of
from offsite_fl.errors import ConfigError
from tests.comparing.conftest import FEDADAM, FEDAVG, measured


@pytest.fixture
def places(settings: GridSettings, tmp_path: Path) -> Places:
    return Places(settings, Inputs("m", 6, "rows", "test", "public"), tmp_path / "out")


def test_a_cell_by_hand(places: Places) -> None:
    found = measured(FEDAVG, 3.0)
    told = settings_of(places, found)
    assert (told["strategy"], told["emulator"], told["partition"]) == ("fedavg", "layer-drop:keep=2", "iid")
    assert (told["seed"], told["rounds"], told["tune.max-steps"], told["error"]) == (0, 2, 2, "")
    final = final_values(found)
    assert final["final/plug_in"] == 3.0 and final["final/gap"] == 2.0 and final["final/worst_client"] == 3.5
    assert final["final/by_domain/north"] == 3.0 and final["final/zero_shot"] == 4.0


def test_each_cell_is_a_run(places: Places) -> None:
    track = CellTracker(places, "tensorboard")
    cells = [dataclasses.replace(measured(arm, 3.0), key=key * 64) for key, arm in (("1", FEDAVG), ("2", FEDADAM))]
    for found in [*cells, dataclasses.replace(measured(FEDAVG, None), key="3" * 64)]:
        track(found)
    folders = sorted(path.name for path in (places.out / "tracking").iterdir())
    assert folders == sorted([*map(run_name, cells), "fedavg-layer-drop-keep-2-iid-seed-0-33333333"])
    held = EventAccumulator(str(places.out / "tracking" / run_name(cells[0])))
    held.Reload()
    assert [(event.step, event.value) for event in held.Scalars("plug-in/loss")] == [(0, 4.0), (1, 3.5), (2, 3.0)]
    assert [(event.step, event.value) for event in held.Scalars("final/gap")] == [(2, 2.0)]
    assert [event.value for event in held.Scalars("bytes/down")] == [10.0, 10.0]


def test_a_tracker_that_can_not_go_on_does_not_end_the_comparison(
    places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def gone(*args: object) -> None:
        asked.append(args)
        raise ConfigError("the tracker tensorboard can't begin at there: no space")

    track = CellTracker(places, "tensorboard", "there")
    monkeypatch.setattr(tracking, "Tracking", gone)
    with caplog.at_level(logging.WARNING):
        track(measured(FEDAVG, 3.0))
        track(measured(FEDADAM, 3.0))
    assert len(asked) == 1 and "no space; cells aren't tracked from here on" in caplog.text


def test_one_that_is_unknown_is_an_error_at_once(places: Places) -> None:
    with pytest.raises(ConfigError, match="unknown tracker"):
        CellTracker(places, "wandb")
    CellTracker(places, "")(measured(FEDAVG, 3.0))
    assert not places.out.exists()
