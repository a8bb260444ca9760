"""Every registered strategy on the same sites: order, resuming, a reply that can't be used, and one site alone."""

from __future__ import annotations

import random
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
from tests.by_name import OF_SITES, spec
from tests.flower_fakes import all_nodes
from tests.pico_clients import one_owner, own_process, reasons  # noqa: F401  (fixtures)

TEXTS = ("rain falls on the hills. ", "we sold 40 bolts of cloth. ", "the cat sat on the mat. ")
TUNE = {"max_steps": 1, "batch_size": 2, "block_size": 16, "lr": 0.01, "progress": False}


def sites(folder: Path) -> dict[int, dict[str, Any]]:
    """Node configs of the sites a, b and c, with two, three and four rows."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = {}
    for i, words in enumerate(TEXTS):
        data = folder / f"{i}.txt"
        data.write_text(words * 8 * (i + 1))
        nodes[500 + i] = {"name": "abc"[i], "data": str(data), "cache-dir": str(folder / f"cache-{i}")}
    return nodes


def strategy(name: str, owner: ModelOwner, folder: Path, nodes: int = 3, **options: Any) -> OffsiteTuning:
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    tune = TuneConfig(**{**TUNE, **OF_SITES.get(name, {})})
    folder.mkdir(parents=True, exist_ok=True)
    public = folder.parent / "public.txt"
    public.write_text("a dog lay by the door of the house. " * 20)
    return OffsiteTuning(
        make_strategy(spec(name), **all_nodes(nodes)),
        owner,
        tune=tune,
        public=public,
        run_dir=folder,
        progress=False,
        **options,
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


# Of one site alone. Adaptive servers take steps of their own, QFedAvg divides by its own estimate of curvature, Bulyan
# wants three replies, and FLoRA's reply, factors, is another thing than its result: tests/strategies/test_lora_*.py.
OTHERWISE = {"fedadam", "fedadagrad", "fedyogi", "qfedavg", "bulyan", "flora"}


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - OTHERWISE))
def test_one_site_is_that_site(name: str, owner: ModelOwner, tmp_path: Path) -> None:
    replies: list[dict[str, torch.Tensor]] = []
    app = make_client_app()

    def watched(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train":
            (record,) = reply.content.array_records.values()
            replies.append({key: torch.from_numpy(array.numpy().copy()) for key, array in record.items()})
        return reply

    made = strategy(name, owner, tmp_path / "run", nodes=1)
    sent = made.state
    found = rounds(made, InProcessGrid(watched, dict([*sites(tmp_path).items()][:1])), 1)
    (reply,) = replies
    assert not reasons(made) and reply.keys() <= found.keys() == sent.keys()
    assert any(not torch.equal(found[key], value) for key, value in sent.items())
    wanted = {**sent, **reply}
    if name == "flexlora":  # other factors of the same product
        found, wanted = products(found), products(wanted)
    assert all(torch.allclose(found[key], value, rtol=1e-5, atol=1e-6) for key, value in wanted.items())


def products(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A by the name of A."""
    return {key: state[key.replace("lora_A", "lora_B")] @ value for key, value in state.items() if "lora_A" in key}
