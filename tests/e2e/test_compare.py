"""A tiny grid by the command line: measured once, then the same command does nothing."""

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
