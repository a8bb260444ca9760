"""The quickstart with multiple choice: only its config differs, and everything it reports is in accuracy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS
from simulations.demo import APP, TASKS
from simulations.in_process import InProcessGrid, task_identity
from simulations.running import settings_of
from tests.conftest import make_pico, make_tokenizer

OWNERS = ("north", "south")
WORDS = ("snow", "sand", "rain", "wind")


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The app, imported as Flower does: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(APP))
    import quickstart.client_app
    import quickstart.server_app

    with task_identity():
        yield quickstart
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        del sys.modules[name]


def config(**more: object) -> dict[str, Any]:
    """The app's own settings with the task's over them, as ``flwr run --run-config choices.toml`` does it."""
    group, wanted = "tool.flwr.app.config.", TASKS["choices"]
    assert wanted is not None
    found = settings_of(APP / "pyproject.toml")
    own = {key.removeprefix(group): value for key, value in found.items() if key.startswith(group)}
    assert set(settings_of(wanted)) <= set(own)  # Flower refuses keys that the app doesn't have
    return own | settings_of(wanted) | more


@pytest.fixture
def ground(tmp_path: Path, cache_dir: Path) -> Path:
    make_pico("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for stem in (*OWNERS, "test"):
        rows = [
            {"prompt": f"{place} of {stem}: the {word}", "choices": ["fell", "was still", "ran"], "answer": i % 3}
            for i, (place, word) in enumerate((p, w) for p in ("hill", "house") for w in WORDS)
        ]
        (tmp_path / "data" / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "public.txt").write_text("the cat sat on the mat and the dog lay by the door. " * 20)
    return tmp_path


def test_a_run_in_accuracy(quickstart: Any, ground: Path) -> None:
    settings = config(
        **{
            "model": str(ground / "model"),
            "split": "1-1",
            "emulator": "layer-drop:keep=2",
            "calibration-tokens": 64,
            "num-server-rounds": 1,
            "tune.max-steps": 2,
            "tune.batch-size": 2,
            "tune.block-size": 48,
            "tune.schedule-steps": 2,
            "tune.lr": 0.01,
            "data.folder": str(ground / "data"),
            "data.owners": ",".join(OWNERS),
            "test.tokens": 5 * 48,
            "test.every": 1,
            "repair.run": True,
            "run.folder": str(ground / "run"),
        }
    )
    grid = InProcessGrid.of_partitions(quickstart.client_app.app, OWNERS)
    for node, node_config in grid.nodes.items():
        grid.contexts[node] = Context(1, node, node_config, RecordDict(), settings)
    quickstart.server_app.main(grid, Context(1, 0, {}, RecordDict(), settings))
    report = RunReport.read(ground / "run")
    assert [key for key, row in report.rows if row.measure == "accuracy"] == list(ROW_KEYS)
    assert all(abs(5 * row.value - round(5 * row.value)) < 1e-9 for _, row in report.rows)  # of five questions
    assert [entry.plug_in is not None and entry.plug_in.loss is None for entry in report.rounds] == [True, True]
    assert set(report.rounds[1].clients) == set(OWNERS)
    assert report.data["held-out test"]["questions"] == 5
    said = " ".join(report.notes)
    assert "standard error of up to 22.4 points" in said and "its accuracy was" in said
    assert "2 sequential optimiser steps of 4 examples" in said  # and not of the fewer that full blocks would be
    assert "Perplexit" not in said
