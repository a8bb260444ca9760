"""FedOT: FedAvg's numbers, and a run under this name is really that baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from offsite_fl.errors import ConfigError
from offsite_fl.models.split import Split
from offsite_fl.strategies import FedOT, OffsiteTuning
from offsite_fl.strategies.named import make_strategy
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import StubOwner, run, sites


@dataclass
class Blocks:
    depth: int = 6


@dataclass
class Owner(StubOwner):
    """What FedOT looks at of a model owner."""

    split: Split = field(default_factory=lambda: Split(first=2, last=2))
    emulator: str = "layer-drop:keep=1+distill:steps=10"
    blocks: Blocks = field(default_factory=Blocks)

    @property
    def adapter_indices(self) -> tuple[int, ...]:
        return self.split.resolve(self.blocks.depth)


def wrapped(base: FedAvg, **options: Any) -> OffsiteTuning:
    return OffsiteTuning(base, Owner(**options))  # type: ignore[arg-type]


def test_it_averages_as_fedavg_does() -> None:
    def federate(base: FedAvg) -> dict[str, torch.Tensor]:
        return run(wrapped(base), FakeGrid(Adder(lambda node, r: 1.0 + node["index"]), sites(3, [1, 2, 5])), 2)

    ours, flowers = federate(FedOT(**all_nodes(3))), federate(FedAvg(**all_nodes(3)))
    assert all(torch.equal(ours[name], flowers[name]) for name in flowers)


@pytest.mark.parametrize(
    ("options", "base", "message"),
    [
        ({"split": Split(first=0, last=2)}, "fedot", "set it to 2-2, or take fedot:placement=any"),
        ({"split": Split(at=(0, 2, 5))}, "fedot", "fedot:placement=any"),
        ({"emulator": "layer-drop:keep=2"}, "fedot", r"add \+distill to it, or take fedot:distilled=false"),
        ({"emulator": "low-rank:keep=0.5"}, "fedot:placement=any", "distilled once"),
    ],
)
def test_another_set_up_is_not_this_baseline(options: dict[str, Any], base: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrapped(make_strategy(base), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "base"),
    [
        ({}, "fedot"),
        ({"split": Split(first=1, last=3)}, "fedot"),
        ({"emulator": "scaleot:keep=2"}, "fedot"),
        ({"split": Split(first=0, last=2), "emulator": "crash:keep=2"}, "fedot:placement=any,distilled=false"),
    ],
)
def test_these_are(options: dict[str, Any], base: str) -> None:
    assert isinstance(wrapped(make_strategy(base), **options).base, FedOT)  # type: ignore[arg-type]


def test_an_unknown_placement_is_named() -> None:
    with pytest.raises(ConfigError, match="placement must be both-ends or any, got 'last'"):
        FedOT(placement="last")
