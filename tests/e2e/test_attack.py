"""The quickstart's keys for attacks by ``flwr run``: who is named misbehaves, and a wrong spec ends before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite_fl.config import CACHE_VARIABLE
from offsite_fl.evaluation.record import RunReport
from simulations.local_flower import local_flower, module_path
from tests.e2e.conftest import APP, OWNERS, PATIENCE, SETTINGS, write_data, write_model

ROOT = Path(__file__).parents[2]
SHORT = {
    "num-server-rounds": 1,
    "split": "0-2",
    "strategy": "fedbiot:first-steps=1,align-rank=2,align-batch=2",
    "baseline.run": False,
    "attackers": "1",
}


def test_the_attackers_reply_is_spoilt_and_a_wrong_spec_is_refused(
    ground: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(ground / "cache"))
    write_model(ground / "model")
    write_data(ground / "data")
    settings = SETTINGS | SHORT | {"model": ground / "model", "data.folder": ground / "data"}
    with local_flower(ground / "flower", supernodes=len(OWNERS), environment=module_path(ROOT)) as flower:
        flower.run(APP, settings | {"attack": "nam", "run.folder": ground / "wrong"}, timeout=PATIENCE)
        said = "".join(capfd.readouterr())
        flower.run(APP, settings | {"attack": "nan", "run.folder": ground / "right"}, timeout=PATIENCE)

    assert "unknown attack 'nam'" in said and not (ground / "wrong").exists()  # not even a bundle was made
    report = RunReport.read(ground / "right")
    (dropped,) = report.rounds[1].dropped
    assert dropped.node == OWNERS[1] and "finite" in dropped.reason
    assert set(report.rounds[1].clients) == {OWNERS[0]} and not report.rounds[1].skipped
    # What simulated owners remember lies with their run, so that another one may have another public text.
    assert len(list((ground / "right" / "sites" / "public").glob("*.json"))) == len(OWNERS)
    assert not (ground / "cache" / "public").exists() and not (ground / "cache" / "patches").exists()
