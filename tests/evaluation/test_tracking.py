"""Trackers: TensorBoard's event file read back, MLflow through a package of its name, and none that ends a run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offsite_fl.errors import ConfigError
from offsite_fl.evaluation import tracking
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import Dropped, RoundRecord
from offsite_fl.evaluation.rows import FiveRows, Row
from offsite_fl.evaluation.tracking import Tracking, check_tracker, final_values, round_values

# What accelerate's MLflowTracker calls, written down as it comes. The real library was tried by hand.
FAKE_MLFLOW = """
import json, os
from types import SimpleNamespace
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
calls = []
def _note(name):
    def call(*args, **kwargs):
        calls.append([name, [*args], {k: v for k, v in kwargs.items() if v is not None}])
        if name == os.environ.get("FAKE_MLFLOW_FAILS"):
            raise OSError("the server is gone")
        return [] if name == "search_experiments" else "7"
    return call
for _name in ("set_tracking_uri", "search_experiments", "create_experiment", "start_run", "log_params", "log_metrics",
              "end_run"):
    globals()[_name] = _note(_name)
"""


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "site" / "mlflow").mkdir(parents=True)
    (tmp_path / "site" / "mlflow" / "__init__.py").write_text(FAKE_MLFLOW)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    import mlflow as module

    yield module
    del sys.modules["mlflow"]


def record() -> tuple[RoundRecord, Ledger]:
    clients = {"north": {"train_loss": 2.0, "steps": 4.0}, "south": {"train_loss": 3.0}}
    ledger = Ledger()
    for number, way, size in ((1, "down", 100), (1, "down", 20), (1, "up", 7), (2, "up", 1000)):
        ledger.add(number, "adapter" if way == "down" else "update", way, "north", size)  # type: ignore[arg-type]
    dropped = [Dropped("west", "not finite")]
    return RoundRecord(1, Row(1.0), Row(2.0), clients, dropped, clipped=1, seconds=2.5), ledger


def test_a_round_by_hand() -> None:
    e = 2.718281828459045
    assert round_values(*record()) == pytest.approx(
        {
            "plug-in/loss": 1.0,
            "plug-in/perplexity": e,
            "emulator/loss": 2.0,
            "emulator/perplexity": e * e,
            "clients/north/train_loss": 2.0,
            "clients/south/train_loss": 3.0,
            "clients/north/steps": 4.0,
            "mean/train_loss": 2.5,
            "mean/steps": 4.0,
            "replies/good": 2,
            "replies/dropped": 1,
            "replies/clipped": 1,
            "bytes/down": 120,
            "bytes/up": 7,
            "seconds": 2.5,
        }
    )
    assert round_values(RoundRecord(0, Row(accuracy=0.5)), Ledger()) == {"plug-in/accuracy": 0.5}


def test_the_five_rows_by_hand() -> None:
    rows = FiveRows(Row(4.0), Row(6.0), Row(5.0), Row(3.5), Row(3.0))
    found = final_values(rows)
    assert found["rows/gap"] == 1.5 and found["rows/recovered"] == 0.5 and found["rows/plug_in/loss"] == 3.5
    assert len(found) == 5 + 2 and "rows/recovered" not in final_values(FiveRows(*(Row(1.0),) * 4))


def test_tensorboard_holds_what_was_told(tmp_path: Path) -> None:
    settings = {"tune.lr": 0.1, "run.resume": False, "data.owners": ("a", "b"), "tune.device": None}
    run = Tracking("tensorboard", str(tmp_path / "there"), "a run", settings, tmp_path / "unused")
    for number in (1, 2):
        entry, ledger = record()
        entry.round = number
        run.round(entry, ledger)
    run.log({"rows/gap": 1.5, "odd name (%)": 1.0}, 2)
    run.close()
    run.log({"late": 1.0}, 3)  # over is over
    assert not (tmp_path / "unused").exists()
    held = EventAccumulator(str(tmp_path / "there" / "a-run"))
    held.Reload()
    scalars = {name: [(event.step, event.value) for event in held.Scalars(name)] for name in held.Tags()["scalars"]}
    assert scalars["plug-in/loss"] == [(1, 1.0), (2, 1.0)] and scalars["bytes/up"] == [(1, 7.0), (2, 1000.0)]
    assert scalars["rows/gap"] == [(2, 1.5)] and scalars["odd-name-"] == [(2, 1.0)] and "late" not in scalars
    (yml,) = (tmp_path / "there" / "a-run").glob("*/hparams.yml")
    assert yml.read_text() == "data.owners: a,b\nrun.resume: false\ntune.device: ''\ntune.lr: 0.1\n"


@pytest.mark.parametrize(
    ("where", "variable", "uri"),
    [
        ("", "", "sqlite:///{tmp}/here/mlflow.db"),
        ("{tmp}/else", "", "sqlite:///{tmp}/else/mlflow.db"),
        ("http://127.0.0.1:5000", "http://other", "http://127.0.0.1:5000"),
        ("", "http://other", None),  # mlflow itself goes by the variable
    ],
)
def test_mlflow_is_told_through_accelerate(
    where: str, variable: str, uri: str | None, mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    run = Tracking("mlflow", where.format(tmp=tmp_path), "a run", {"tune.lr": 0.1}, tmp_path / "here")
    run.log({"plug-in/loss": 2}, 1)
    run.close()
    calls = {name: (args, kwargs) for name, args, kwargs in mlflow.calls}
    told = calls.get("set_tracking_uri")
    assert told == (None if uri is None else ([uri.format(tmp=tmp_path)], {}))
    made = calls["create_experiment"][1]
    assert made["name"] == "offsite-fl" and ("artifact_location" in made) == ("sqlite" in str(uri))
    assert calls["start_run"][1]["run_name"] == "a-run"
    assert calls["log_params"] == ([{"tune.lr": 0.1}], {})
    assert calls["log_metrics"] == ([{"plug-in/loss": 2.0}], {"step": 1})
    assert mlflow.calls[-1][0] == "end_run"


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_MLFLOW_FAILS", "log_metrics")
    run = Tracking("mlflow", "", "run", {}, tmp_path)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            run.log({"loss": 1.0}, number)
        run.close()
    assert json.dumps([name for name, *_ in mlflow.calls]).count("log_metrics") == 1
    assert caplog.text.count("the tracker mlflow failed and is left out from here on: the server is gone") == 1


def test_one_that_can_not_begin_ends_the_run_before_it(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MLFLOW_FAILS", "start_run")
    with pytest.raises(ConfigError, match=r"the tracker mlflow can't begin at http://h: the server is gone"):
        Tracking("mlflow", "http://h", "run", {}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"the tracker tensorboard can't begin at {tmp_path / 'file'}"):
        Tracking("tensorboard", str(tmp_path / "file"), "run", {}, tmp_path)


def test_what_can_not_be_had_is_said_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for kind in ("tensorboard", "mlflow"):
        with pytest.raises(ConfigError, match=rf"pip install 'offsite-fl\[{kind}\]'"):
            Tracking(kind, "", "run", {}, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_tracker("tensorbord")
    with pytest.raises(ConfigError, match="writes into a folder, http://h is none"):
        check_tracker("tensorboard", "http://h")
    with pytest.raises(ConfigError, match="but no tracker"):
        check_tracker("", "folder")
    assert not list(tmp_path.iterdir())


def test_none_does_nothing(tmp_path: Path) -> None:
    run = Tracking("", "", "run", {"a": object()}, tmp_path)
    run.round(*record())
    run.close()
    assert not list(tmp_path.iterdir())
