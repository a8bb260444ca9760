"""Every registered strategy on the same three sites: order, resuming, and a reply that can't be used."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.named import STRATEGIES, make_strategy
from simulations.in_process import InProcessGrid
from tests.flower_fakes import all_nodes
from tests.pico_clients import fresh_process, owner_with_bundle, reasons

TEXTS = ("rain falls on the hills. ", "we sold 40 bolts of cloth. ", "the cat sat on the mat. ")
# What a name needs beside itself: options of the spec, and settings of the sites.
OPTIONS = {
    "qfedavg": "client-learning-rate=0.01",
    "fedot": "placement=any,distilled=false",
    "fedbiot": "placement=any,first-steps=2,align-steps=1,align-rank=2,align-batch=2",
    "fedprox": "proximal-mu=0.1",
    "fedavgm": "server-momentum=0.5",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "scaffold": {"optimizer": "sgd"},
    **{name: {"lora_rank": 2} for name in ("fedbiot", "flora", "flexlora", "ffa-lora", "rolora")},
}
TUNE = {"max_steps": 1, "batch_size": 2, "block_size": 16, "lr": 0.01, "progress": False}


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    return owner_with_bundle(tmp_path_factory.mktemp("owner"))


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    with fresh_process():
        yield


def sites(folder: Path) -> dict[int, dict[str, Any]]:
    """Node configs of the sites a, b and c, with two, three and four rows."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = {}
    for i, words in enumerate(TEXTS):
        data = folder / f"{i}.txt"
        data.write_text(words * 8 * (i + 1))
        nodes[500 + i] = {"name": "abc"[i], "data": str(data), "cache-dir": str(folder / f"cache-{i}")}
    return nodes


def strategy(name: str, owner: ModelOwner, folder: Path, **options: Any) -> OffsiteTuning:
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    spec = f"{name}:{OPTIONS[name]}" if name in OPTIONS else name
    tune = TuneConfig(**{**TUNE, **SETTINGS.get(name, {})})
    folder.mkdir(parents=True, exist_ok=True)
    public = folder.parent / "public.txt"
    public.write_text("a dog lay by the door of the house. " * 20)
    return OffsiteTuning(
        make_strategy(spec, **all_nodes(3)), owner, tune=tune, public=public, run_dir=folder, progress=False, **options
    )


def rounds(made: OffsiteTuning, grid: InProcessGrid, count: int) -> dict[str, torch.Tensor]:
    result = made.start(grid, num_rounds=count)
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_resumed_rounds_are_the_same_to_the_bit_and_order_is_nothing(
    name: str, owner: ModelOwner, tmp_path: Path
) -> None:
    whole = strategy(name, owner, tmp_path / "whole" / "run")
    expected = rounds(whole, InProcessGrid(make_client_app(), sites(tmp_path / "whole")), 2)
    assert not reasons(whole) and not any(record.skipped for record in whole.history)
    start = strategy(name, owner, tmp_path / "start" / "run").state
    assert any(not torch.equal(expected[key], start[key]) for key in expected.keys() & start.keys())

    nodes = sites(tmp_path / "parts")
    rounds(strategy(name, owner, tmp_path / "parts" / "run"), InProcessGrid(make_client_app(), nodes), 1)
    again = strategy(name, owner, tmp_path / "parts" / "run", resume=True)
    resumed = rounds(again, InProcessGrid(make_client_app(), nodes), 2)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())

    backwards = dict(reversed(sites(tmp_path / "back").items()))
    turned = rounds(strategy(name, owner, tmp_path / "back" / "run"), InProcessGrid(make_client_app(), backwards), 2)
    # Adaptive servers divide by roots of small differences, factors are found anew by an SVD: not to the last bit.
    assert all(torch.allclose(turned[key], value, rtol=1e-3, atol=1e-4) for key, value in expected.items())


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_reply_of_nan_is_dropped_and_spoils_nothing(name: str, owner: ModelOwner, tmp_path: Path) -> None:
    app = make_client_app()

    def spoilt(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if context.node_config["name"] == "c" and message.metadata.message_type == "train":
            for record in reply.content.array_records.values():
                for array in record.values():
                    array.data = array.data[:-4] + np.array(np.nan, np.float32).tobytes()
        return reply

    made = strategy(name, owner, tmp_path / "run")
    found = rounds(made, InProcessGrid(spoilt, sites(tmp_path)), 1)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert [reason for reason in reasons(made) if "aren't finite" in reason] == reasons(made)[:1]
    # Bulyan wants three good replies at the least, and otherwise leaves everything as it was.
    assert made.history[-1].skipped == (name == "bulyan") == (len(reasons(made)) == 2)
