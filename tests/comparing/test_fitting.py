"""A strategy that can't run in a grid is named before anything is made, with what it wants."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from offsite_fl.comparing.fitting import check_attacks, check_strategies
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import ConfigError
from tests.comparing.conftest import grid_table

DISTILLED = "layer-drop:keep=2+distill:steps=1"


def settings(strategy: str, split: str, emulator: str = "layer-drop:keep=2", **tune: Any) -> GridSettings:
    table = grid_table(strategies=[strategy, "fedavg"], emulators=[emulator])
    table["model"]["split"] = split
    return GridSettings.of(table | {"tune-for": {strategy: tune}})


@pytest.mark.parametrize(
    ("strategy", "split", "emulator", "tune", "said"),
    [
        ("fedbiot", "1-1", "layer-drop:keep=2", {}, "tunes the last blocks, but the split is 1-1: set it to 0-2"),
        ("fedbiot", "0-2", "layer-drop:keep=2", {"proximal-mu": 0.1}, "leave out tune.proximal-mu = 0.1"),
        ("fedot", "0-2", DISTILLED, {}, "set it to 2-2, or take fedot:placement=any"),
        ("fedot", "2-2", "layer-drop:keep=2", {}, "add \\+distill to it"),
        ("scaffold", "2-2", "layer-drop:keep=2", {}, "optimizer"),
        ("fedper", "0-1", "layer-drop:keep=2", {}, "leaves no adapter block to share"),
        ("fedper:personal=4", "2-2", "layer-drop:keep=2", {}, "it has 0, 1, 2, 3"),
        ("flora", "2-2", "layer-drop:keep=2", {}, "set tune.lora-rank"),
        ("flexlora", "2-2", "layer-drop:keep=2", {"lora-rank": 2, "lora-fresh": True}, "leave it out"),
        ("ditto", "2-2", "layer-drop:keep=2", {"lora-rank": 2, "lora-fresh": True}, "leave out lora-fresh"),
    ],
)
def test_what_can_not_be_is_said_with_the_strategys_name(
    strategy: str, split: str, emulator: str, tune: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"{strategy}.* can't run in this grid: .*{said}"):
        check_strategies(settings(strategy, split, emulator, **tune), 6)


@pytest.mark.parametrize(
    ("strategy", "split", "emulator", "tune"),
    [
        ("fedbiot", "0-2", "layer-drop:keep=2", {"lora-rank": 2}),
        ("fedbiot:placement=any", "1-1", "layer-drop:keep=2", {}),
        ("fedot", "2-2", DISTILLED, {}),
        ("scaffold", "0-2", "layer-drop:keep=2", {"optimizer": "sgd"}),
        ("ditto", "2-2", "layer-drop:keep=2", {}),
        ("fedper", "2-2", "layer-drop:keep=2", {}),
        ("flora", "2-2", "layer-drop:keep=2", {"lora-rank": 2}),
        ("flexlora", "2-2", "layer-drop:keep=2", {"lora-rank": 2}),
        ("rolora", "2-2", "layer-drop:keep=2", {"lora-rank": 2}),
    ],
)
def test_what_can_be_passes(strategy: str, split: str, emulator: str, tune: dict[str, Any]) -> None:
    check_strategies(settings(strategy, split, emulator, **tune), 6)


# Attacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "said"), [("sing-flip", "did you mean 'sign-flip'"), ("scale:factr=3", "factor"), ("nan+", "empty part")]
)
def test_an_attack_that_nobody_can_carry_out_is_said_before_the_first_cell(attack: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_attacks(GridSettings.of(grid_table(attacks=["none", "sign-flip", attack])), Path.cwd())


def test_the_package_of_attacks_is_looked_for_where_clients_look(tmp_path: Path) -> None:
    own = tmp_path / "own_attacks_of_a_test.py"
    own.write_text("class Threat:\n    @classmethod\n    def of(cls, config):\n        return config\n")
    settings = GridSettings.of(grid_table(attacks=["mine"], **{"attack-package": own.stem}))
    before = list(sys.path)
    with pytest.raises(ConfigError, match=own.stem):
        check_attacks(settings, tmp_path / "elsewhere")
    check_attacks(settings, tmp_path)
    check_attacks(GridSettings.of(grid_table(**{"attack-package": "no_such_package"})), tmp_path)  # nobody attacks
    assert sys.path == before
