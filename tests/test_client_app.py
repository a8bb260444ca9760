"""The client app with a real pico bundle: caching, tuning, and that one site leaves no trace in another."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr.app import ConfigRecord, Message
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    Strategy,
)

from offsite_fl.bundle import Cache
from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.local.answering import WITHHELD
from offsite_fl.local.open_network import networks
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.wire.settings import client_seed
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_clients import (
    own_process,  # noqa: F401  (fixtures)
    owner_with_bundle,
    reasons,
    two_sites,
)

TUNE = TuneConfig(max_steps=2, lr=1e-2, batch_size=2, block_size=12, progress=False, device="cpu")


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    """A pico llama whose emulator is two quantised blocks (fault 31: a 4-bit base must survive the second round)."""
    return owner_with_bundle(tmp_path_factory.mktemp("owner"), "layer-drop:keep=2+quantize:bits=4,group=16")


@pytest.fixture(scope="module")
def exact_cache() -> dict[str, torch.Tensor]:
    """What two rounds in fp32 give, filled by the first test that needs it."""
    return {}


@pytest.fixture
def sites(tmp_path: Path) -> dict[int, dict[str, Any]]:
    return two_sites(tmp_path)


def nodes_of(count: int, **options: Any) -> dict[str, Any]:
    return {"fraction_evaluate": 0.0, **all_nodes(count), **options}


def federate(owner: ModelOwner, nodes: dict[int, dict[str, Any]], rounds: int, **options: Any) -> OffsiteTuning:
    """Run ``rounds`` rounds and return the strategy."""
    base = options.pop("base", None) or FedAvg(**nodes_of(len(nodes)))
    app = options.pop("app", None) or make_client_app()
    grid = options.pop("grid", None) or FakeGrid(app, nodes)
    strategy = OffsiteTuning(base, owner, **{"tune": TUNE, **options})
    strategy.start(grid, num_rounds=rounds)
    return strategy


def test_two_rounds_with_a_quantised_base(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    grid = FakeGrid(make_client_app(), sites)
    strategy = federate(owner, sites, 2, grid=grid)
    assert not reasons(strategy)
    assert strategy.ledger.total(round=1, kind="bundle") >= 2 * owner.bundle.total_bytes  # type: ignore[union-attr]
    assert strategy.ledger.total(round=2, kind="bundle") == 0
    assert [len(grid.types("query.bundle")), len(grid.types("train"))] == [2, 4]
    record = strategy.history[2]
    assert set(record.clients) == {"a", "b"} and record.clients["a"]["train_loss"] > 0
    before = {name: tensor.clone() for name, tensor in owner.model.state_dict().items()}
    owner.plug_in(strategy.update())
    changed = {name for name, t in owner.model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed and all(".layers.0." in name or ".layers.5." in name for name in changed)
    owner.model.load_state_dict(before)


def test_one_client_is_single_party_tuning_with_the_same_seed(owner: ModelOwner, sites: dict[int, Any]) -> None:
    site = {500: sites[500]}
    federated = federate(owner, site, 1).update()
    alone = DataOwner.open(owner.bundle).tune(  # type: ignore[arg-type]
        sites[500]["data"], dataclasses.replace(TUNE, seed=client_seed(TUNE.seed, 1, "a"))
    )
    assert all(torch.equal(federated.tensors[name], alone.tensors[name]) for name in alone.tensors)
    assert federated.num_examples == alone.num_examples
    changed = [name for name, t in alone.tensors.items() if not torch.equal(t, owner.initial_state()[name])]
    assert len(changed) == len(alone.tensors)


def test_a_restarted_process_finds_its_cache(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    federate(owner, sites, 1)
    networks.clear()
    grid = FakeGrid(make_client_app(), {node + 90: config for node, config in sites.items()})  # new node ids too
    strategy = federate(owner, grid.nodes, 1, grid=grid)
    assert not grid.types("train.bundle") and len(grid.types("train")) == 2
    assert strategy.ledger.total(kind="bundle") == 0


def test_a_transfer_that_broke_off_goes_on(owner: ModelOwner, sites: dict[int, Any]) -> None:
    site = {500: sites[500]}
    broken = FakeGrid(make_client_app(), site, lambda r: None if r.metadata.message_type == "train.bundle" else r)
    strategy = OffsiteTuning(FedAvg(**nodes_of(1)), owner, tune=TUNE)
    strategy.delivery.pack_bytes = 1  # a message for each file
    strategy.start(broken, num_rounds=1)
    assert reasons(strategy)[0] == "bundle delivery: no answer in time"
    files = len(owner.bundle.files())  # type: ignore[union-attr]
    again = FakeGrid(make_client_app(), site)
    strategy = OffsiteTuning(FedAvg(**nodes_of(1)), owner, tune=TUNE)
    strategy.delivery.pack_bytes = 1
    strategy.start(again, num_rounds=1)
    assert len(again.types("train.bundle")) == files - 1 and not reasons(strategy)


def test_an_evicted_bundle_is_reported_and_delivered_again(owner: ModelOwner, sites: dict[int, Any]) -> None:
    site = {500: sites[500]}
    cache = Path(sites[500]["cache-dir"])

    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train" and len(strategy.history) == 2:
            networks.clear()
            gc.collect()  # the lease on the bundle
            Cache(cache, max_bytes=1)._evict(owner.bundle.digest)  # type: ignore[union-attr]
        return reply

    grid = FakeGrid(make_client_app(), site, tamper)
    strategy = OffsiteTuning(FedAvg(**nodes_of(1)), owner, tune=TUNE)
    strategy.start(grid, num_rounds=3)
    assert "isn't in this site's cache" in reasons(strategy)[0]
    assert [record.skipped for record in strategy.history] == [False, False, True, False]
    assert len(grid.types("query.bundle")) == 2


def test_virtual_clients_share_the_network_and_leave_no_trace(
    owner: ModelOwner, sites: dict[int, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {node: {**config, "cache-dir": str(tmp_path / "one")} for node, config in sites.items()}
    opened: list[Any] = []
    real = DataOwner.open
    monkeypatch.setattr(DataOwner, "open", lambda *a: opened.append(a) or real(*a))  # type: ignore[func-returns-value]
    together = federate(owner, shared, 2)
    assert len(opened) == 1

    def as_processes(message: Any, context: Any) -> Message:
        networks.clear()
        return make_client_app()(message, context)

    apart = federate(owner, dict(reversed(sites.items())), 2, app=as_processes)
    one, other = together.update().tensors, apart.update().tensors
    assert all(torch.equal(one[name], other[name]) for name in one)
    network = next(iter(networks._open.values())).model
    frozen = real(owner.bundle).model.state_dict()  # type: ignore[arg-type]
    same = {n for n, t in network.state_dict().items() if torch.equal(t, frozen[n])}
    assert {n for n in frozen if ".layers.0." not in n and ".layers.3." not in n} <= same


def test_lora_factors_only(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    tune = dataclasses.replace(TUNE, lora_rank=2, lora_targets=("q_proj", "down_proj"), validation_share=0.3)
    strategy = federate(owner, sites, 2, tune=tune, codec="int8", base=FedAvg(**nodes_of(2, fraction_evaluate=1.0)))
    assert not reasons(strategy)
    update = strategy.update()
    assert all(".lora_" in name for name in update.tensors) and update.lora == tune.lora
    assert all(bool(t.abs().max() > 0) for name, t in update.tensors.items() if "lora_B" in name)
    full = strategy.ledger.total(round=1, kind="adapter", node="a")
    assert full < owner.bundle.bytes_by_kind()["adapter"] / 10  # type: ignore[union-attr]
    with owner.plugged_in(update.tensors, update.lora) as model:
        assert model is owner.model
    assert strategy.history[2].clients["a"]["evaluate_loss"] > 0


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_codecs_stay_close_to_fp32(
    owner: ModelOwner, sites: dict[int, dict[str, Any]], codec: str, exact_cache: dict[str, torch.Tensor]
) -> None:
    if not exact_cache:
        exact_cache.update(federate(owner, sites, 2).update().tensors)
    exact = exact_cache
    short = federate(owner, sites, 2, codec=codec).update().tensors
    # two steps of at most 1e-2 a round; values up to about 1 (2**-8 each way), differences to the bundle below 0.05
    worst = max(float((exact[name] - short[name]).abs().max()) for name in exact)
    assert 0 < worst < 0.03


def test_the_proximal_term_is_applied(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    start = owner.initial_state()

    def moved(mu: float) -> float:
        # Plain SGD: Adam's steps don't shrink with the gradient
        tune = dataclasses.replace(TUNE, optimizer="sgd", lr=0.05, max_steps=6, clip_norm=0.0)
        after = federate(owner, sites, 1, tune=tune, base=FedProx(proximal_mu=mu, **nodes_of(2))).update().tensors
        return sum(float((after[name] - start[name]).square().sum()) for name in start) ** 0.5

    assert moved(10.0) < 0.7 * moved(0.0)


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam"])
def test_resume_with_the_real_data_owner(owner: ModelOwner, sites: dict[int, Any], name: str, tmp_path: Path) -> None:
    bases: dict[str, Callable[[], Strategy]] = {
        "FedAvg": lambda: FedAvg(**nodes_of(2)),
        "FedAvgM": lambda: FedAvgM(server_momentum=0.9, **nodes_of(2)),
        "FedAdam": lambda: FedAdam(eta=1e-2, **nodes_of(2)),
    }
    whole = federate(owner, sites, 4, base=bases[name]()).update().tensors
    federate(owner, sites, 2, base=bases[name](), run_dir=tmp_path)
    networks.clear()
    np.random.seed(1), torch.manual_seed(1)
    parts = federate(owner, sites, 4, base=bases[name](), run_dir=tmp_path, resume=True).update().tensors
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_reasons_reach_the_server(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    faults = {
        "tune.lora-rank can't be set for one site": {"tune.lora-rank": 2},
        "did you mean 'batch-size'": {"tune.batchsize": 2},
    }
    nodes = {i: {**sites[500], "name": f"n{i}", **fault} for i, fault in enumerate(faults.values())}
    strategy = federate(owner, {**nodes, 99: sites[501]}, 1)
    found = {dropped.node: dropped.reason for dropped in strategy.history[1].dropped}
    assert all(part in found[f"n{i}"] for i, part in enumerate(faults)), found
    assert not strategy.history[1].skipped  # the one good site counts


def test_what_is_wrong_with_private_data_stays_at_the_site(
    owner: ModelOwner, sites: dict[int, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, secret = tmp_path / "broken.jsonl", tmp_path / "secret.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    secret.write_text('{"text": {"patient": "John Doe"}}\n')
    faults = {
        "this site names no data file": {"data": 1},
        "doesn't exist": {"data": str(tmp_path / "none.txt")},
        "broken.jsonl, line 2": {"data": str(broken)},
        "secret.jsonl, line 1, column 'text': a value of type dict": {"data": str(secret)},
    }
    nodes = {i: {**sites[500], "name": f"n{i}", **fault} for i, fault in enumerate(faults.values())}
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        strategy = federate(owner, {**nodes, 99: sites[501]}, 1)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    found = {dropped.node: dropped.reason for dropped in strategy.history[1].dropped}
    assert set(found.values()) == {f"DataError: {WITHHELD}"} and len(found) == len(faults)
    assert all(part in caplog.text for part in faults)
    assert "John" not in caplog.text


def test_data_from_code_and_its_own_validation_split(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    calls: list[tuple[list[Any], list[Any]]] = []
    real = DataOwner.tune

    def spy(self: DataOwner, source: Any, config: Any, *, validation: Any, **options: Any) -> Any:
        calls.append((source["input_ids"], validation["input_ids"] if validation is not None else []))
        return real(self, source, config, validation=validation, **options)

    data = Dataset.from_dict({"text": [f"line {i} has the number {i * i}. " * 2 for i in range(20)]})
    tune = dataclasses.replace(TUNE, validation_share=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataOwner, "tune", spy)
        strategy = federate(
            owner,
            {500: sites[500]},
            2,
            tune=tune,
            app=make_client_app(lambda context: data),
            base=FedAvg(**nodes_of(1, fraction_evaluate=1.0)),
        )
    (train, held), (train_2, held_2) = ([list(map(tuple, part)) for part in call] for call in calls)
    assert held and not set(train) & set(held)
    assert (sorted(train), sorted(held)) == (sorted(train_2), sorted(held_2))  # what is held back stays held back
    assert strategy.history[2].clients["a"]["evaluate_num-examples"] == len(held)
    both = make_client_app(lambda context: (data.select(range(10)), data.select(range(10, 20))))
    tuned = federate(owner, {500: sites[500]}, 1, app=both, base=FedAvg(**nodes_of(1, fraction_evaluate=1.0)))
    assert "validation_loss" in tuned.history[1].clients["a"] and "evaluate_loss" in tuned.history[1].clients["a"]


def test_sites_without_validation_data_aren_t_asked(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    grid = FakeGrid(make_client_app(), sites)
    strategy = federate(owner, sites, 2, grid=grid, base=FedAvg(**nodes_of(2, fraction_evaluate=1.0)))
    assert not grid.types("evaluate") and not reasons(strategy)
    only = FakeGrid(make_client_app(), sites)  # one that was never tuned can't have said so
    strategy = OffsiteTuning(FedAvg(**nodes_of(2, fraction_evaluate=1.0)), owner, tune=TUNE)
    strategy.journal.begin(1)
    messages = strategy.configure_evaluate(1, strategy.initial_arrays(), ConfigRecord(), only)
    assert strategy.aggregate_evaluate(1, only.send_and_receive(messages)) is None
    assert len(only.types("evaluate")) == 2 and not reasons(strategy)


def test_a_site_s_own_settings(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    seen: list[TuneConfig] = []
    real = DataOwner.tune
    sites[501] |= {"tune.batch-size": 1, "tune.gradient-accumulation": 2}

    def spy(self: DataOwner, source: Any, config: TuneConfig, **options: Any) -> Any:
        seen.append(config)
        return real(self, source, config, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataOwner, "tune", spy)
        federate(owner, sites, 1)
    by_seed = {config.seed: config for config in seen}
    assert by_seed[client_seed(0, 1, "a")].batch_size == 2
    assert by_seed[client_seed(0, 1, "b")].batch_size == 1 and len(by_seed) == 2


def test_privacy_mods_go_around_tuning_only(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    # Around the whole app they would answer queries and bundle messages with errors (fault 29).
    base = DifferentialPrivacyClientSideFixedClipping(FedAvg(**nodes_of(2)), 0.0, 0.01, 2)
    strategy = federate(owner, sites, 1, base=base, app=make_client_app(train_mods=[fixedclipping_mod]))
    assert not reasons(strategy)
    start, after = owner.initial_state(), strategy.update().tensors
    moved = sum(float((after[name] - start[name]).double().square().sum()) for name in start) ** 0.5
    assert 0 < moved <= 0.01 * 1.001


def test_privacy_mods_refuse_encoded_values(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    app = make_client_app(train_mods=[LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
    strategy = federate(owner, sites, 1, codec="int8", app=app)
    assert all("hides the values from the privacy mod" in reason for reason in reasons(strategy)[:2])


def test_names_of_sites(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    plain = {k: v for k, v in sites[500].items() if k != "name"}
    strategy = federate(owner, {7: {**plain, "partition-id": 3}, 8: plain}, 1)
    assert set(strategy.history[1].clients) == {"client-3", "node-8"}
    app = make_client_app(name=lambda context: "mine" if context.node_id == 7 else None)
    named = federate(owner, {7: plain, 8: {**plain, "name": "own"}}, 1, app=app)
    assert set(named.history[1].clients) == {"mine", "own"}


def test_a_forged_digest_reaches_no_path(owner: ModelOwner, sites: dict[int, dict[str, Any]]) -> None:
    strategy = OffsiteTuning(FedAvg(**nodes_of(1)), owner, tune=TUNE)
    strategy.delivery.bundle = dataclasses.replace(owner.bundle, digest="../../etc")  # type: ignore[type-var]
    strategy.start(FakeGrid(make_client_app(), {500: sites[500]}), num_rounds=1)
    assert "isn't a bundle digest" in reasons(strategy)[0]
