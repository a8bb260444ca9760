from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite_fl.config import LoraOptions, TuneConfig, from_mapping, to_mapping
from offsite_fl.errors import ConfigError


def test_defaults_survive_a_round_trip() -> None:
    flat = to_mapping(TuneConfig(), "tune.")
    assert set(map(type, flat.values())) <= {str, int, float, bool}  # all that a Flower ConfigRecord holds
    assert flat["tune.max-steps"] == "" and flat["tune.lora-targets"] == ""
    assert from_mapping(TuneConfig, flat, "tune.") == TuneConfig()


@given(
    lr=st.floats(1e-9, 1.0),
    steps=st.none() | st.integers(1, 2**62),
    seed=st.integers(0, 2**63 - 1),
    rank=st.integers(0, 64),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj", "fc1"]), max_size=3),
    progress=st.booleans(),
)
def test_any_settings_survive_a_round_trip(
    lr: float, steps: int | None, seed: int, rank: int, targets: list[str], progress: bool
) -> None:
    config = TuneConfig(
        lr=lr, max_steps=steps, seed=seed, lora_rank=rank, lora_targets=tuple(targets), progress=progress
    )
    assert from_mapping(TuneConfig, to_mapping(config)) == config
    # The command line and environment carry text only.
    as_text = {key: str(value) for key, value in to_mapping(config).items()}
    assert from_mapping(TuneConfig, as_text) == config


def test_a_prefix_leaves_the_other_keys_alone() -> None:
    assert from_mapping(LoraOptions, {"lora.rank": 2, "tune.lr": 1.0}, "lora.") == LoraOptions(rank=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max-steps": ""}, None),
        ({"max-steps": None}, None),
        ({"max-steps": "7"}, 7),
        ({"max-steps": 7.0}, 7),
        ({"max-steps": "1e3"}, 1000),
    ],
)
def test_optional_ints(values: dict[str, Any], expected: int | None) -> None:
    assert from_mapping(TuneConfig, values).max_steps == expected


def test_long_seeds_keep_every_digit() -> None:
    seed = 2**53 + 1  # the first whole number that a float rounds
    assert from_mapping(TuneConfig, {"seed": seed}).seed == seed
    assert from_mapping(TuneConfig, {"seed": str(seed)}).seed == seed


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), ("false", False), ("True", True), (1, True), ("0", False)]
)
def test_bools(value: Any, expected: bool) -> None:
    assert from_mapping(TuneConfig, {"progress": value}).progress is expected


def test_tuples_from_text_lists_and_single_values() -> None:
    @dataclass(frozen=True)
    class Places:
        at: tuple[int, ...] = ()

    for value, expected in [("0, 5,18", (0, 5, 18)), ([1, 2], (1, 2)), (4, (4,)), ("", ())]:
        assert from_mapping(Places, {"at": value}).at == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning-rate": 1.0}, "unknown setting 'learning-rate'"),
        ({"max_steps": 3}, "did you mean 'max-steps'"),
        ({"batch-size": 2.5}, "batch-size = 2.5 must be of type int"),
        ({"batch-size": "many"}, "batch-size = 'many' must be of type int"),
        ({"batch-size": math.inf}, "must be of type int"),
        ({"batch-size": True}, "must be of type int"),
        ({"batch-size": None}, "must be of type int"),
        ({"lr": [1.0]}, "lr = \\[1.0\\] must be of type float"),
        ({"progress": "perhaps"}, "progress = 'perhaps' must be of type bool"),
        ({"progress": []}, "must be of type bool"),
        ({"progress": 0.5}, "must be of type bool"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"lora-targets": [None]}, "must be of type str"),
    ],
)
def test_wrong_entries_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(TuneConfig, values)


def test_a_missing_setting_is_named() -> None:
    @dataclass(frozen=True)
    class Needy:
        keep: int
        names: tuple[str, ...] = dataclasses.field(default_factory=tuple)

    with pytest.raises(ConfigError, match=r"setting 'drop\.keep' is missing"):
        from_mapping(Needy, {}, "drop.")
    assert from_mapping(Needy, {"drop.keep": 3}, "drop.") == Needy(3)


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"max_steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"batch_size": 0},
        {"gradient_accumulation": 0},
        {"block_size": 1},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"proximal_mu": math.nan},
        {"validation_share": 1.0},
        {"eval_every": 0},
        {"schedule_steps": 0},
        {"patience": 0, "validation_share": 0.1},
        {"lora_rank": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"lora_rank": 4, "lora_alpha": 0.0},
        {"lora_rank": 4, "lora_dropout": 1.0},
        {"schedule": "cosin"},
        {"precision": "fp8"},
        {"frozen_dtype": "float64"},
    ],
)
def test_settings_out_of_range_raise_when_made(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TuneConfig(**values)


def test_which_factors_are_trained_and_kept() -> None:
    config = TuneConfig(lora_rank=4, lora_train="b")
    assert config.kept_lora == config.lora == LoraOptions(rank=4)
    fresh = TuneConfig(lora_rank=4, lora_fresh=True)
    assert fresh.lora == LoraOptions(rank=4) and fresh.kept_lora is None and TuneConfig().kept_lora is None
    assert config.without_lora() == fresh.without_lora() == TuneConfig()
    for wrong in ({"lora_train": "a"}, {"lora_fresh": True}):
        with pytest.raises(ConfigError, match="needs a lora-rank above 0"):
            TuneConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="trains both factors"):
        TuneConfig(lora_rank=4, lora_train="b", lora_fresh=True)
    with pytest.raises(ConfigError, match="lora-train = 'c' isn't possible"):
        TuneConfig(lora_rank=4, lora_train="c")  # type: ignore[arg-type]


def test_lora_part() -> None:
    assert TuneConfig().lora is None
    config = TuneConfig(lora_rank=4, lora_alpha=8.0, lora_targets=("q_proj",))
    assert config.lora == LoraOptions(rank=4, alpha=8.0, targets=("q_proj",))
