"""Each registered strategy in a real simulation: two rounds by ``flwr run``, with its name and options changed only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offsite_fl.config import CACHE_VARIABLE
from offsite_fl.evaluation.record import RunReport
from offsite_fl.strategies.named import STRATEGIES
from simulations.local_flower import LocalFlower, local_flower
from tests.by_name import OF_SITES, spec
from tests.e2e.conftest import APP, OWNERS, PATIENCE, SETTINGS, write_data, write_model

SITES = (*OWNERS, "east")  # Bulyan wants three


def ran(flower: LocalFlower, ground: Path, name: str) -> str:
    """What was wrong with the run of ``name``, or nothing."""
    folder = ground / name
    settings: dict[str, object] = {
        "model": ground / "model",
        "data.folder": ground / "data",
        "data.owners": ",".join(SITES),
        "run.folder": folder,
        "baseline.run": False,
        "strategy": spec(name),
    }
    own = {"tune." + key.replace("_", "-"): value for key, value in OF_SITES.get(name, {}).items()}
    if flower.run(APP, SETTINGS | settings | own, timeout=PATIENCE) != 0 or not (folder / "report.json").exists():
        return f"{name}: no report"
    report = RunReport.read(folder)
    after = report.rounds[1:]
    if len(after) != 2 or any(set(entry.clients) != set(SITES) or entry.dropped or entry.skipped for entry in after):
        return f"{name}: {[(sorted(entry.clients), entry.dropped, entry.skipped) for entry in after]}"
    return "" if report.rows.plug_in != report.rows.full_zero_shot else f"{name}: the plug-in is the untuned model"


@pytest.mark.slow
def test_two_rounds_of_each(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(ground / "cache"))
    write_model(ground / "model")
    write_data(ground / "data")
    row = json.dumps({"text": "wind blew in the east and the hill was still. " * 4})
    (ground / "data" / "east.jsonl").write_text(f"{row}\n" * 3)
    with local_flower(ground / "flower", supernodes=len(SITES)) as flower:
        wrong = [said for name in sorted(STRATEGIES) if (said := ran(flower, ground, name))]
    assert not wrong
