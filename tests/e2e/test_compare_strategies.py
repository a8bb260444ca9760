"""Strategies that want more than FedAvg does, each in a cell of one grid, on the same clients one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import compare, write_data, write_grid, write_model

FEDBIOT = "fedbiot:first-steps=2,align-steps=1,align-rank=2,align-batch=2"
OTHER_LENGTH = f"{FEDBIOT},epsilon=0.01"
STRATEGIES = [
    FEDBIOT,
    OTHER_LENGTH,
    "fedot:placement=any,distilled=false",
    "scaffold",
    "ditto",
    "fedper",
    "flora",
    "flexlora",
    "rolora",
]
LORA = {FEDBIOT, "flora", "flexlora", "rolora"}


def own_tables() -> str:
    """Settings of the clients of single strategies, and no baselines."""
    own = [f'[tune-for."{name}"]\nlora-rank = 2\n' for name in STRATEGIES if name in LORA]
    # Another block length is another question about the public text, put to the same clients.
    own.append(f'[tune-for."{OTHER_LENGTH}"]\nlora-rank = 2\nblock-size = 12\n')
    own.append('[tune-for.scaffold]\noptimizer = "sgd"\n[baselines]\nrun = []\n')
    return "".join(own)


@pytest.mark.slow  # real processes are test_compare.py's, every strategy's rounds tests/strategies/test_every_name.py's
def test_each_runs_in_a_cell(ground: Path) -> None:
    write_model(ground / "model")
    write_data(ground / "data")
    write_grid(ground, STRATEGIES, "0-2", rounds=1, more=own_tables())
    done = compare(ground)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["missing"] == 0 and not table["failed"], table["failed"]
    assert {s["strategy"] for s in table["standings"] if s["plug_in"]["mean"] > 0} == set(STRATEGIES)
    for cell in map(json.loads, (ground / "out" / "cells.jsonl").read_text().splitlines()):
        assert not any(entry["dropped"] for entry in cell["rounds"]), cell["strategy"]
        patched = {entry["node"] for entry in cell["ledger"] if entry["kind"] == "patch"}
        assert patched == ({"client-0", "client-1"} if cell["strategy"].startswith("fedbiot") else set())
    assert not list((ground / "out" / "work" / "sites").glob("*"))  # what clients remember goes with their cell
