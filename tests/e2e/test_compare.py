"""Tiny grids by the command line: measured once, then the same command does nothing; other axes, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import OWNERS, compare, write_data, write_grid, write_model


def test_a_grid_is_measured_once_and_the_second_time_nothing_runs(ground: Path) -> None:
    write_model(ground / "model")
    write_data(ground / "data")
    lines = [json.dumps({"text": f"rain fell in the {owner}. " * 9, "owner": owner}) for owner in OWNERS]
    (ground / "data" / "test.jsonl").write_text("\n".join(lines) + "\n")
    write_grid(ground, ["fedavg", "krum:num-malicious-nodes=9"], "1-1", rounds=2)
    listed = json.loads(compare(ground, "--list").stdout)
    assert {entry["state"] for entry in listed} == {"to do"}

    done = compare(ground, "--tracker", "tensorboard")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    by_role = {(s["role"], s["strategy"]): s for s in table["standings"]}
    assert table["missing"] == 0 and not table["failed"], table["failed"]
    assert len(by_role) == 2 + 6 and all(s["plug_in"]["mean"] > 0 for s in by_role.values())
    fedavg, zero = by_role["strategy", "fedavg"], by_role["zero-shot", ""]
    assert fedavg["plug_in"] != zero["plug_in"] and fedavg["down"] > fedavg["up"] > 0
    # Nothing is compressed there, so the tuned emulator is the plug-in; with layers dropped it isn't.
    assert by_role["uncompressed", "fedavg"]["gap"]["mean"] == pytest.approx(0, abs=1e-5)
    assert abs(fedavg["gap"]["mean"]) > 1e-4
    assert by_role["full-fine-tuning", ""]["recovered"]["mean"] in (pytest.approx(1.0), None)
    lines = (ground / "out" / "cells.jsonl").read_text().splitlines()
    first = next(found for found in map(json.loads, lines) if found["strategy"] == "fedavg")
    assert set(first["by_client"]) == {f"client-{i}" for i in range(len(OWNERS))} and len(first["rounds"]) == 3

    assert len(list((ground / "out" / "tracking").iterdir())) == len(lines)  # each cell is a run there

    page = (ground / "out" / "compare.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "fedavg" in page
    assert (ground / "out" / "compare.tex").read_text().startswith(r"\begin{tabular}")
    again = compare(ground)
    assert again.returncode == 0 and json.loads(again.stdout)["standings"] == table["standings"]
    assert (ground / "out" / "cells.jsonl").read_text().splitlines() == lines


ATTACK = "sign-flip+scale:factor=20"
AXES = f"""rounds = 1
fractions = [0.5, 1.0]
attacks = ["none", "{ATTACK}"]
attackers = [1]
"""


@pytest.mark.slow  # the grid above has processes too, test_attack.py attackers
def test_attacks_and_fractions_in_two_flower_runs_side_by_side(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parents[2])
    )  # where the attacks are; the command runs elsewhere
    write_model(ground / "model")
    write_data(ground / "data")
    write_grid(ground, ["fedavg"], "1-1", rounds=1, more="[baselines]\nrun = []\n")
    grid = ground / "grid.toml"
    grid.write_text(grid.read_text().replace("rounds = 1\n", AXES))
    done = compare(ground, "--parallel", "2")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["missing"] == 0 and not table["failed"], table["failed"]
    assert {path.name for path in (ground / "out" / "work").glob("run-*.log")} == {"run-0.log", "run-1.log"}
    lines = map(json.loads, (ground / "out" / "cells.jsonl").read_text().splitlines())
    cells = {(line["fraction"], line["attack"]): line for line in lines}
    assert len(cells) == 4
    assert [len(cells[share, ""]["rounds"][1]["clients"]) for share in (0.5, 1.0)] == [1, len(OWNERS)]
    honest, attacked = (cells[1.0, attack]["rounds"][1]["plug_in"]["loss"] for attack in ("", ATTACK))
    assert attacked > honest + 0.1
