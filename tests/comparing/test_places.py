"""Keys change with everything that the numbers depend on, and with nothing else."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from offsite_fl.comparing.cells import Arm, Cell, Condition, cells
from offsite_fl.comparing.places import Inputs, Places, whole_run
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.config import TuneConfig
from tests.comparing.conftest import grid_table

INPUTS = Inputs("model", 6, "rows", "test", "public")
CELL = Cell(Arm("strategy", "fedavg", "layer-drop:keep=2"), Condition("iid", 2, 1.0, ""), 0)


def places(table: dict[str, Any] | None = None, inputs: Inputs = INPUTS) -> Places:
    return Places(GridSettings.of(table or grid_table()), inputs, Path("out"))


def changed(part: str, key: str, value: Any) -> dict[str, Any]:
    table = copy.deepcopy(grid_table())
    table.setdefault(part, {})[key] = value
    return table


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("grid", "rounds", 3),
        ("grid", "codec", "bf16"),
        ("tune", "lr", 0.5),
        ("tune", "max-steps", 3),
        ("test", "tokens", 99),
        ("model", "split", "0-2"),
        ("model", "calibration-tokens", 99),
        ("tune-for", "fedavg", {"lr": 0.5}),
    ],
)
def test_what_the_numbers_depend_on_is_in_the_key(part: str, key: str, value: Any) -> None:
    assert places(changed(part, key, value)).key(CELL) != places().key(CELL)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Inputs)])
def test_so_are_the_inputs(field: str) -> None:
    other = dataclasses.replace(INPUTS, **{field: 7 if field == "depth" else "other"})
    assert places(inputs=other).key(CELL) != places().key(CELL)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("grid", "seeds", [0, 5]),
        ("grid", "strategies", ["fedavg", "krum:num-malicious-nodes=1"]),
        ("grid", "attackers", [1]),  # nobody attacks
        ("tune", "device", "cpu"),
        ("tune", "progress", False),
        ("baselines", "full-lr", 0.3),
        ("tune-for", "fedadam:eta=0.01", {"lr": 0.5}),
    ],
)
def test_what_they_do_not_depend_on_is_not(part: str, key: str, value: Any) -> None:
    assert places(changed(part, key, value)).key(CELL) == places().key(CELL)


@pytest.mark.parametrize(("key", "value"), [("attackers", [1]), ("attack-package", "mine")])
def test_under_an_attack_they_depend_on_who_carries_out_whose(key: str, value: Any) -> None:
    cell = dataclasses.replace(CELL, condition=Condition("iid", 2, 1.0, "nan"))
    assert places(changed("grid", key, value)).key(cell) != places().key(cell)


def test_keys_of_a_grid_are_distinct_and_wording_does_not_count() -> None:
    here = places()
    keys = [here.key(cell) for cell in cells(here.settings)]
    assert len(set(keys)) == len(keys)
    reworded = dataclasses.replace(CELL, condition=Condition(" iid", 2, 1.0, ""))
    assert here.key(reworded) == here.key(CELL)
    assert here.key(dataclasses.replace(CELL, seed=1)) != here.key(CELL)


def test_lora_on_the_full_model_leaves_the_middle_block_out() -> None:
    cell = Cell(Arm("full-lora", "fedavg"), Condition("iid", 2, 1.0), 0)
    assert places().split(cell).at == (0, 1, 2, 4, 5)
    assert places().tune(cell).lora_rank == 8 and places().emulator(cell) == "whole"


def test_bundles_are_shared_by_what_they_are_made_of() -> None:
    here = places()
    other = dataclasses.replace(CELL, seed=1, condition=Condition("natural", 2, 1.0, ""))
    assert here.bundle(CELL) == here.bundle(other)
    assert here.bundle(CELL) != here.bundle(Cell(Arm("zero-shot"), Condition(), 0))
    assert (
        here.data(CELL) == Path("out/data/iid-2/seed-0") and here.data(Cell(Arm("zero-shot"), Condition(), 0)) is None
    )


def test_a_whole_run_has_the_steps_of_all_rounds() -> None:
    assert whole_run(TuneConfig(max_steps=3), 4).max_steps == 12
    assert whole_run(TuneConfig(epochs=0.5), 4).epochs == 2.0
