"""GRID.toml: what is read, and that mistakes are told by part and key with what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offsite_fl.comparing.settings import GridSettings, read_grid
from offsite_fl.errors import ConfigError
from tests.comparing.conftest import grid_table


def test_defaults_and_one_schedule_over_all_rounds() -> None:
    settings = GridSettings.of(grid_table())
    assert settings.grid.clients == (2,) and settings.grid.fractions == (1.0,) and settings.grid.attacks == ("",)
    tune = settings.tune_of("fedavg", 7)
    assert (tune.max_steps, tune.schedule_steps, tune.seed, tune.progress) == (2, 4, 7, False)


def test_honest_clients_are_an_attack_by_the_name_of_none() -> None:
    assert GridSettings.of(grid_table(attacks=["none", "sign-flip"])).grid.attacks == ("", "sign-flip")


def test_a_strategy_may_tune_otherwise() -> None:
    table = grid_table() | {"tune-for": {"fedavg": {"lora-rank": 4, "lr": 0.5}}}
    settings = GridSettings.of(table)
    assert settings.tune_of("fedavg", 0).lora_rank == 4 and settings.tune_of("fedavg", 0).lr == 0.5
    assert settings.tune_of("fedadam:eta=0.01", 0).lora_rank == 0


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"strategies": ["fedavgg"]}, "did you mean 'fedavg'"),
        ({"strategies": []}, "grid.strategies: give at least one"),
        ({"strategies": ["fedavg", "fedavg"]}, "names one twice"),
        ({"emulators": ["layerdrop:keep=2"]}, "did you mean 'layer-drop'"),
        ({"partitions": ["dirichlet:alfa=0.1"]}, "alpha"),
        ({"partitions": ["dirichlet:alpha=0"]}, "alpha must be above 0"),
        ({"clients": [0]}, "clients must be at least 1"),
        ({"clients": [3]}, "'natural' makes 2 clients of 2 domains, not 3"),
        ({"fractions": [1.5]}, "fractions must lie above 0"),
        ({"seeds": [-1]}, "seeds must be 0 or above"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"codec": "fp33"}, "did you mean 'fp32'"),
        ({"attacks": ["sign-flip"], "codec": "int8"}, "fp32"),
        ({"attacks": ["nan"], "attackers": [2]}, "attackers names client 2, but clients are numbered from 0 to 1"),
        ({"attacks": ["nan"], "attackers": [-1]}, "attackers names client -1"),
        ({"attacks": ["nan"], "attackers": []}, "attackers: name at least one"),
        (
            {"attacks": ["nan"], "attackers": [2], "clients": [3, 2], "partitions": ["iid"]},
            "names client 2, but clients are numbered from 0 to 1 at the least",
        ),
        ({"round": 3}, "did you mean 'rounds'"),
    ],
)
def test_mistakes_in_the_axes(axes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        GridSettings.of(grid_table(**axes))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("gird", {}, "did you mean 'grid'"),
        ("baselines", {"run": ["allone"]}, "did you mean 'alone'"),
        ("tune-for", {"fedprox": {}}, "isn't in grid.strategies"),
        ("tune-for", {"fedavg": {"lrr": 1}}, "did you mean"),
        ("data", {"owners": ["a"], "folder": "x", "corpus": "y"}, "exactly one of them"),
        ("model", {"split": "2-2"}, "model.path.* is missing"),
        ("test", {"tokens": 0}, "test.tokens"),
        ("grid", grid_table(rounds=5)["grid"], "rounds = 5 must be a multiple of test.every = 2"),
    ],
)
def test_mistakes_in_the_other_parts(part: str, value: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GridSettings.of(grid_table() | {"test": {"every": 2}} | {part: value})


def test_a_last_round_that_is_measured_is_all_that_every_must_give() -> None:
    """Otherwise the plug-in of an earlier round would stand beside the bytes and references of all rounds."""
    for rounds, every in ((4, 2), (3, 1), (2, 5)):
        assert GridSettings.of(grid_table(rounds=rounds) | {"test": {"every": every}}).test.every == every


def test_a_part_that_is_needed_is_missing() -> None:
    table = grid_table()
    del table["data"]
    with pytest.raises(ConfigError, match=r"\[data\] is missing"):
        GridSettings.of(table)


def test_files_that_are_no_grid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no grid"):
        read_grid(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[grid\n")
    with pytest.raises(ConfigError, match="isn't TOML"):
        read_grid(tmp_path / "bad.toml")


def test_paths_are_relative_to_the_grid_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "g.toml").write_text('[model]\npath = "model"\n[data]\nfolder = "texts"\n')
    table = read_grid(tmp_path / "g.toml")
    assert table["model"]["path"] == str(tmp_path / "model") and table["data"]["folder"] == str(tmp_path / "texts")
    (tmp_path / "h.toml").write_text('[model]\npath = "smollm2"\n')
    assert read_grid(tmp_path / "h.toml")["model"]["path"] == "smollm2"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "simulations" / "compare").glob("*.toml")), ids=str
)
def test_the_grids_that_come_along_can_be_read(path: Path) -> None:
    assert GridSettings.of(read_grid(path)).grid.strategies
