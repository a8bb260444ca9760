"""Federations of pico classifiers: the head travels with the update, under the strategies that people use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr.serverapp.strategy import FedAvg, FedProx, Krum, Strategy

from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.measure import Measure
from offsite_fl.models.head import HEAD
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import Ditto, FedPer, FFALoRA, FlexLoRA, FLoRA, OffsiteTuning, RoLoRA
from tests.conftest import make_tokenizer
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_classifiers import image_folder, labelled_rows, make_classifier, make_image_processor
from tests.pico_clients import fresh_process, reasons

TUNE = TuneConfig(max_steps=6, lr=2e-3, head_lr_scale=5.0, batch_size=4, block_size=16, progress=False, device="cpu")
SITES = 3


def federation(kind: str, folder: Path) -> tuple[ModelOwner, FakeGrid, Any]:
    """An owner, three sites with data of their own (in the paths of their node configs), and a test set."""
    nodes: dict[int, dict[str, Any]] = {}
    processor = make_image_processor() if kind == "vit" else make_tokenizer()
    for site in range(SITES):
        if kind == "vit":
            data: Any = image_folder(folder / f"data-{site}", 3, seed=site)
        else:
            data = folder / f"data-{site}.jsonl"
            Dataset.from_list(labelled_rows(3, seed=site)).to_json(data)
        nodes[500 + site] = {"name": "abc"[site], "data": str(data), "cache-dir": str(folder / f"cache-{site}")}
    owner = ModelOwner(make_classifier(kind), processor, Split(first=1, last=1))
    owner.make_bundle("layer-drop:keep=2", folder / "bundle")
    test = image_folder(folder / "test", 4, seed=9) if kind == "vit" else Dataset.from_list(labelled_rows(4, seed=9))
    return owner, FakeGrid(make_client_app(), nodes), test


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(**all_nodes(SITES)),
    "FedProx": lambda: FedProx(proximal_mu=0.1, **all_nodes(SITES)),
    "Krum": lambda: Krum(num_malicious_nodes=0, **all_nodes(SITES)),
    "Ditto": lambda: Ditto(lam=0.1, **all_nodes(SITES)),
    "FedPer": lambda: FedPer(**all_nodes(SITES)),
}


@pytest.mark.parametrize(("kind", "name"), [("vit", "FedAvg"), *(("bert", name) for name in STRATEGIES)])
def test_two_rounds(kind: str, name: str, tmp_path: Path) -> None:
    with fresh_process():
        owner, grid, test = federation(kind, tmp_path)
        strategy = OffsiteTuning(STRATEGIES[name](), owner, tune=TUNE)
        strategy.start(grid, num_rounds=2)
        assert reasons(strategy) == []
        first = owner.initial_state()
        heads = [n for n in strategy.state if n.startswith("adapter.head.")]
        assert {n.removeprefix("adapter.head.") for n in heads} == set(owner.head)
        assert all(not torch.equal(strategy.state[n], first[n]) for n in heads)
        if name == "FedAvg":
            rows = Measure(owner, test, block_size=16, device="cpu")
            zero, plugged = rows.full_zero_shot(), rows.plug_in(strategy.state)
            assert plugged.accuracy is not None and zero.accuracy is not None
            assert plugged.accuracy > zero.accuracy


LORA: dict[str, Callable[[], Strategy]] = {
    "FedAvg": STRATEGIES["FedAvg"],
    "FLoRA": lambda: FLoRA(**all_nodes(SITES)),
    "FlexLoRA": lambda: FlexLoRA(**all_nodes(SITES)),
    "FFALoRA": lambda: FFALoRA(**all_nodes(SITES)),
    "RoLoRA": lambda: RoLoRA(**all_nodes(SITES)),
    "Ditto": STRATEGIES["Ditto"],
}


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", LORA)
def test_a_head_travels_whole_beside_factors(name: str, codec: str, tmp_path: Path) -> None:
    tune = replace(TUNE, lora_rank=2, lora_alpha=4.0, lr=1e-2, head_lr_scale=1.0)
    with fresh_process():
        owner, grid, test = federation("bert", tmp_path)
        grid.nodes[501]["tune.lora-rank"] = 1 if name in ("FLoRA", "FlexLoRA") else 2
        strategy = OffsiteTuning(LORA[name](), owner, tune=tune, codec=codec)
        strategy.start(grid, num_rounds=2)
        assert reasons(strategy) == []
        first = owner.adapter()
        heads = {HEAD + path for path in owner.head}
        assert all(not torch.equal(strategy.state[n], first[n]) for n in heads)
        batches, nll = Measure(owner, test, block_size=16, device="cpu").batches, objective_of(owner.model).nll
        zero = evaluate_loss(owner.model, batches, "cpu", nll=nll).loss
        owner.plug_in(strategy.update())
        assert evaluate_loss(owner.model, batches, "cpu", nll=nll).loss < zero
        after = owner.adapter()
        assert all(torch.equal(after[n], strategy.state[n]) for n in heads)
        assert {n for n in after if not torch.equal(after[n], first[n])} - heads  # the factors did something too


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_one_round_is_the_mean_of_what_the_sites_tune_alone(lora_rank: int, tmp_path: Path) -> None:
    from offsite_fl.data_owner import DataOwner
    from offsite_fl.wire.settings import client_seed

    settings = replace(TUNE, lora_rank=lora_rank)
    with fresh_process():
        owner, grid, _ = federation("bert", tmp_path)
        strategy = OffsiteTuning(FedAvg(**all_nodes(SITES)), owner, tune=settings)
        strategy.start(grid, num_rounds=1)
        alone = []
        for site in range(SITES):
            tune = replace(settings, seed=client_seed(TUNE.seed, 1, "abc"[site]))
            party = DataOwner.open(owner.bundle, "auto", "cpu")
            begin = strategy.form.reference if lora_rank == 0 else owner.initial_state(tune.lora, TUNE.seed)
            alone.append(party.tune(tmp_path / f"data-{site}.jsonl", tune, start=begin).tensors)
        for name, value in strategy.state.items():
            mean = np.mean([each[name].double().numpy() for each in alone], axis=0)
            np.testing.assert_allclose(value.numpy(), mean, rtol=1e-5, atol=1e-7)
