"""An owner and a bundle of two small tensors, so that every expected value can be worked out by hand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from offsite_fl.strategies import OffsiteTuning
from simulations.in_process import task_identity
from tests.flower_fakes import FakeGrid

FIRST = {"adapter.0.w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "adapter.1.b": torch.tensor([0.5])}


@dataclass
class StubBundle:
    """What the strategy uses of a bundle."""

    digest: str = "d" * 64
    contents: dict[str, bytes] = field(
        default_factory=lambda: {"manifest.json": b"{}", "shards/a": b"1" * 90, "shards/b": b"2" * 90, "t.json": b"[]"}
    )

    @property
    def total_bytes(self) -> int:
        return sum(map(len, self.contents.values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**FIRST, "shared.x": torch.zeros(3)}

    def files(self) -> list[tuple[str, int, str]]:
        return [(name, len(data), "") for name, data in self.contents.items()]

    def read_file(self, name: str) -> bytes:
        return self.contents[name]


@dataclass
class StubOwner:
    """What the strategy uses of a model owner."""

    bundle: Any = field(default_factory=StubBundle)

    def initial_state(self, lora: object = None, seed: int = 0) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in FIRST.items()}


def sites(count: int, examples: list[int] | None = None, first: int = 1000) -> dict[int, dict[str, Any]]:
    """Node ids and node configs of ``count`` sites a, b, c..."""
    weights = examples or [1] * count
    return {first + 7 * i: {"name": chr(ord("a") + i), "index": i, "examples": weights[i]} for i in range(count)}


def wrap(base: Any, **options: Any) -> OffsiteTuning:
    return OffsiteTuning(base, StubOwner(), **options)  # type: ignore[arg-type]


def run(strategy: OffsiteTuning, grid: FakeGrid, rounds: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    """The adapter after ``rounds`` rounds."""
    result = strategy.start(grid, num_rounds=rounds, **options)
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}


@pytest.fixture(scope="session", autouse=True)
def short_collections() -> Iterator[None]:
    """Flower's QFedAvg and Bulyan collect garbage after every record; torch's modules needn't be scanned each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield
