"""The keys that all apps' run configs share, as dataclasses: unknown keys and wrong types are refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from offsite_fl.config import TuneConfig, from_mapping

P = TypeVar("P")


@dataclass(frozen=True)
class FederationKeys:
    """Keys without a dot: the model, where it is cut, how it is compressed, and the federation around it."""

    model: str
    split: str
    emulator: str
    bundle_dtype: str
    bundle_shard_size: str
    strategy: str
    num_server_rounds: int
    min_results: int
    max_update_norm: float
    clip_update_norm: float
    max_norm_ratio: float
    min_cosine: float | None
    streaming: bool
    round_deadline: float
    quorum: int
    codec: str
    delivery_timeout: float
    seed: int


@dataclass(frozen=True)
class BaselinePart:
    """The fifth row."""

    run: bool
    lr: float


@dataclass(frozen=True)
class RunPart:
    """Where results go; ``tracker`` ("tensorboard" or "mlflow") gets the numbers as they come, in ``tracking``."""

    folder: str
    resume: bool
    keep_checkpoints: int
    save_model: bool
    tracker: str = ""
    tracking: str = ""


def parts_of(run_config: Mapping[str, Any], main: type[P], **parts: type[Any]) -> tuple[P, TuneConfig, dict[str, Any]]:
    """The run config as ``main`` (keys without a dot), its ``tune.`` keys with the run's seed, and the other parts.

    ``parts`` are dataclasses by the name of their group: ``run=RunPart`` takes the keys that begin with ``run.``.
    ``ConfigError`` names the key that is wrong.
    """
    groups = tuple(f"{name}." for name in ("tune", *parts))
    keys = from_mapping(main, {key: value for key, value in run_config.items() if not key.startswith(groups)})
    tune = {key: value for key, value in run_config.items() if key.startswith("tune.")}
    config = from_mapping(TuneConfig, tune | {"tune.seed": run_config["seed"]}, "tune.")
    return keys, config, {name: from_mapping(part, run_config, f"{name}.") for name, part in parts.items()}
