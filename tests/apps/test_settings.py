"""A run config falls into its parts, and nothing in it goes unread."""

from __future__ import annotations

from typing import Any

import pytest

from offsite_fl.apps import BaselinePart, FederationKeys, RunPart, parts_of
from offsite_fl.errors import ConfigError

GIVEN: dict[str, Any] = {
    "model": "m",
    "split": "1-1",
    "emulator": "layer-drop:keep=0.5",
    "bundle-dtype": "",
    "bundle-shard-size": "256MB",
    "strategy": "fedavg",
    "num-server-rounds": 2,
    "min-results": 1,
    "max-update-norm": 0.0,
    "clip-update-norm": 0.0,
    "max-norm-ratio": 0.0,
    "min-cosine": "",
    "streaming": False,
    "round-deadline": 0.0,
    "quorum": 0,
    "codec": "fp32",
    "delivery-timeout": 60.0,
    "seed": 7,
    "tune.lr": 1e-3,
    "baseline.run": True,
    "baseline.lr": 1e-4,
    "run.folder": "out",
    "run.resume": False,
    "run.keep-checkpoints": 3,
    "run.save-model": False,
}


def test_keys_go_to_their_parts_and_the_seed_to_tuning_too() -> None:
    keys, tune, parts = parts_of(GIVEN, FederationKeys, baseline=BaselinePart, run=RunPart)
    assert (keys.model, keys.num_server_rounds, keys.min_cosine, keys.seed) == ("m", 2, None, 7)
    assert (tune.lr, tune.seed) == (1e-3, 7)
    assert parts["baseline"] == BaselinePart(run=True, lr=1e-4) and parts["run"].folder == "out"


@pytest.mark.parametrize("key", ["modle", "tune.lrr", "run.foldr", "test.tokens"])
def test_unknown_keys_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key.split(".")[-1]):
        parts_of({**GIVEN, key: 1}, FederationKeys, baseline=BaselinePart, run=RunPart)
