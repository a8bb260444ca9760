"""The local algorithms in the real client app on a pico bundle: what travels, what stays, and resuming."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg, Strategy
from safetensors.torch import load_file

from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.local.open_network import networks
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import Ditto, FedNova, FedPer, OffsiteTuning, Scaffold
from offsite_fl.strategies.named import make_strategy
from offsite_fl.wire.settings import client_seed
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_clients import one_owner, own_process, reasons, two_sites  # noqa: F401  (fixtures)

SGD = TuneConfig(
    max_steps=2,
    lr=0.1,
    optimizer="sgd",
    batch_size=2,
    block_size=12,
    progress=False,
    device="cpu",
    validation_share=0.3,
)
LORA = dataclasses.replace(SGD, lora_rank=2, lora_targets=("q_proj", "down_proj"))
BASES: dict[str, Callable[..., Strategy]] = {
    "scaffold": Scaffold,
    "fednova": FedNova,
    "fedper": FedPer,
    "ditto": Ditto,
}
KEEPING = ["scaffold", "fedper", "ditto"]


@pytest.fixture
def sites(tmp_path: Path) -> dict[int, dict[str, Any]]:
    """They share a cache, as on one machine."""
    return two_sites(tmp_path, caches=("cache", "cache"))


def base(name: str, count: int = 2, **options: Any) -> Any:
    return (BASES | {"fedavg": FedAvg})[name](**all_nodes(count), **options)


def federate(owner: ModelOwner, nodes: dict[int, Any], strategy: Any, rounds: int, **options: Any) -> OffsiteTuning:
    grid = options.pop("grid", None) or FakeGrid(options.pop("app", None) or make_client_app(), nodes)
    outer = OffsiteTuning(strategy, owner, **{"tune": SGD, **options})
    outer.start(grid, num_rounds=rounds)
    return outer


def kept(cache: Path, key: str, server_round: int) -> dict[str, dict[str, torch.Tensor]]:
    """What all sites keep after a round of a run, by the folder of the site."""
    found = (cache / "sites" / key).glob(f"*/round-{server_round:05d}.safetensors")
    return {path.parent.name: load_file(path) for path in found}


@pytest.mark.parametrize("tune", [SGD, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", BASES)
def test_two_rounds_and_a_plug_in(owner: ModelOwner, sites: dict[int, Any], name: str, tune: TuneConfig) -> None:
    strategy = federate(owner, sites, base(name), 2, tune=tune)
    assert not reasons(strategy)
    update, start = strategy.update(), owner.initial_state(tune.lora, tune.seed)
    changed = {name for name, value in update.tensors.items() if not torch.equal(value, start[name])}
    slots = {name.split(".")[1] for name in changed}
    assert slots == ({"0"} if name == "fedper" else {"0", "1"})
    for site in "ab":
        told = strategy.history[2].clients[site]
        assert told["train_loss"] > 0 and told["evaluate_loss"] > 0 and told["lr_sum"] == pytest.approx(0.2)
        assert ("evaluate_personal_loss" in told) == (name == "ditto")
    with owner.plugged_in(update.tensors, update.lora) as model:
        assert model is owner.model


@pytest.mark.parametrize("name", KEEPING)
def test_resumed_rounds_equal_uninterrupted_ones(
    owner: ModelOwner, sites: dict[int, Any], name: str, tmp_path: Path
) -> None:
    whole = federate(owner, sites, base(name), 4)
    cache = tmp_path / "cache"
    expected = kept(cache, whole.base.run_key, 4)
    federate(owner, sites, base(name), 2, run_dir=tmp_path / "run")
    networks.clear()
    moved = {node + 900: config for node, config in sites.items()}
    second = federate(owner, moved, base(name), 4, run_dir=tmp_path / "run", resume=True)
    one, other = whole.update().tensors, second.update().tensors
    assert all(torch.equal(one[key], other[key]) for key in one)
    found = kept(cache, second.base.run_key, 4)
    assert len(found) == 2 and found.keys() == expected.keys()
    assert all(torch.equal(expected[site][key], found[site][key]) for site in found for key in found[site])
    assert [r.clients.keys() for r in second.history] == [r.clients.keys() for r in whole.history]


def test_the_first_round_of_scaffold_is_that_of_fedavg(
    owner: ModelOwner, sites: dict[int, Any], tmp_path: Path
) -> None:
    """All control variates are zero; afterwards c_i is the site's own movement by the sum of its learning rates."""
    plain = federate(owner, {500: sites[500]}, base("fedavg", 1), 1).update().tensors
    strategy = federate(owner, {500: sites[500]}, base("scaffold", 1), 1)
    found = strategy.update().tensors
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    start, told = owner.initial_state(), strategy.history[1].clients["a"]
    (own,) = kept(tmp_path / "cache", strategy.base.run_key, 1).values()
    assert own.keys() == start.keys()
    for name, value in own.items():
        expected = (start[name].double() - found[name].double()) / told["lr_sum"]
        assert torch.allclose(value.double(), expected, atol=1e-5)
    # one site is all sites: c = c_1
    assert all(
        torch.allclose(torch.from_numpy(c).float(), own[n], atol=1e-6) for n, c in strategy.base.control().items()
    )


def test_scaffold_of_one_site_is_plain_tuning(owner: ModelOwner, sites: dict[int, Any]) -> None:
    """With c = c_1 the correction is zero in every round."""
    plain = federate(owner, {500: sites[500]}, base("fedavg", 1), 3).update().tensors
    found = federate(owner, {500: sites[500]}, base("scaffold", 1), 3).update().tensors
    assert max(float((plain[name] - found[name]).abs().max()) for name in plain) < 1e-5


def test_personal_blocks_never_leave(owner: ModelOwner, sites: dict[int, Any], tmp_path: Path) -> None:
    carried: list[set[str]] = []

    def tamper(reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            carried.append({name.split(".")[1] for name in next(iter(reply.content.array_records.values()))})
        return reply

    grid = FakeGrid(make_client_app(), sites, tamper)
    strategy = federate(owner, sites, base("fedper", personal="0"), 2, grid=grid)
    assert carried == [{"1"}] * 4
    full = federate(owner, sites, base("fedavg"), 2)
    for direction in ("up", "down"):
        assert strategy.ledger.total(kind="update" if direction == "up" else "adapter") < 0.6 * full.ledger.total(
            kind="update" if direction == "up" else "adapter"
        )
    start = owner.initial_state()
    for own in kept(tmp_path / "cache", strategy.base.run_key, 2).values():
        assert own and all(name.startswith("adapter.0.") for name in own)
        assert all(not torch.equal(value, start[name]) for name, value in own.items())
    one, other = kept(tmp_path / "cache", strategy.base.run_key, 2).values()
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tune", [SGD, LORA], ids=["full", "lora"])
def test_ditto_without_a_pull_is_the_site_alone(
    owner: ModelOwner, sites: dict[int, Any], tune: TuneConfig, tmp_path: Path
) -> None:
    strategy = federate(owner, sites, base("ditto", lam=0.0), 2, tune=dataclasses.replace(tune, validation_share=0.0))
    alone = DataOwner.open(owner.bundle)  # type: ignore[arg-type]
    values = owner.initial_state(tune.lora, tune.seed)
    for number in (1, 2):
        config = dataclasses.replace(tune, validation_share=0.0, seed=client_seed(tune.seed, number, "a"))
        values = dict(alone.tune(sites[500]["data"], config, start=values).tensors)
    found = kept(tmp_path / "cache", strategy.base.run_key, 2).values()
    assert any(all(torch.equal(own[name], values[name]) for name in values) for own in found)


@pytest.mark.parametrize("name", KEEPING)
def test_a_lost_state_is_told_and_the_others_go_on(
    owner: ModelOwner, sites: dict[int, Any], name: str, tmp_path: Path
) -> None:
    nodes = {500: {**sites[500], "cache-dir": str(tmp_path / "own")}, 501: sites[501]}

    def evaluate(server_round: int, arrays: Any) -> None:
        if server_round == 1:
            shutil.rmtree(tmp_path / "own" / "sites")

    outer = OffsiteTuning(base(name, fraction_evaluate=0.0), owner, tune=SGD)
    outer.start(FakeGrid(make_client_app(), nodes), num_rounds=2, evaluate_fn=evaluate)
    (dropped,) = outer.history[2].dropped
    assert dropped.node == "a" and "the server counts on this site's state after round 1" in dropped.reason
    assert not outer.history[2].skipped


@pytest.mark.parametrize("name", KEEPING)
def test_two_sites_of_one_name(owner: ModelOwner, sites: dict[int, Any], name: str, tmp_path: Path) -> None:
    """Only one takes part in a round, and what the first one keeps stays whoever is asked first after a resume."""
    one = {**sites[500], "cache-dir": str(tmp_path / "one")}
    two = {**sites[501], "name": "a", "cache-dir": str(tmp_path / "two")}

    def on(rounds: int, nodes: dict[int, Any], resume: bool) -> OffsiteTuning:
        networks.clear()
        chosen = base(name, 1, fraction_evaluate=0.0)
        return federate(owner, nodes, chosen, rounds, run_dir=tmp_path / "run", resume=resume)

    first = on(2, {500: one}, False)
    before = kept(tmp_path / "one", first.base.run_key, 2)
    third = on(3, {701: two}, True).history[3]
    assert "the server counts on this site's state after round 2" in third.dropped[0].reason and third.skipped
    fourth = on(4, {900: one, 901: two}, True).history[4]
    assert sum("another site is called a too" in dropped.reason for dropped in fourth.dropped) == 1
    assert set(fourth.clients) <= {"a"}
    after = kept(tmp_path / "one", first.base.run_key, 2)
    assert before and all(torch.equal(before[s][k], after[s][k]) for s in before for k in before[s])


def test_a_site_that_is_started_anew_goes_on_with_its_state(
    owner: ModelOwner, sites: dict[int, Any], tmp_path: Path
) -> None:
    grid = FakeGrid(make_client_app(), {500: sites[500]})

    def restart(server_round: int, arrays: Any) -> None:
        if server_round == 1:  # without a key of its own the node has another number then
            grid.nodes = {777: grid.nodes[500]}

    outer = OffsiteTuning(base("scaffold", 1, fraction_evaluate=0.0), owner, tune=SGD)
    outer.start(grid, num_rounds=2, evaluate_fn=restart)
    assert not reasons(outer) and [list(record.clients) for record in outer.history[1:]] == [["a"], ["a"]]


def test_scaffold_sends_up_what_fedavg_does(owner: ModelOwner, sites: dict[int, Any]) -> None:
    found = [federate(owner, sites, base(name, fraction_evaluate=0.0), 1).ledger for name in ("scaffold", "fedavg")]
    up = [ledger.total(kind="update") for ledger in found]
    assert up[0] == up[1] and found[0].total(kind="adapter") > 1.9 * found[1].total(kind="adapter")


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8"])
def test_c_is_the_mean_of_what_the_sites_keep(
    owner: ModelOwner, sites: dict[int, Any], codec: str, tmp_path: Path
) -> None:
    strategy = federate(owner, sites, base("scaffold", fraction_evaluate=0.0), 3, codec=codec)
    one, other = kept(tmp_path / "cache", strategy.base.run_key, 3).values()
    for name, value in strategy.base.control().items():
        assert torch.allclose(torch.from_numpy(value).float(), (one[name] + other[name]) / 2, rtol=0, atol=1e-5)


def test_a_site_s_own_settings_that_do_not_go(owner: ModelOwner, sites: dict[int, Any]) -> None:
    nodes = {500: {**sites[500], "tune.optimizer": "adamw"}, 501: sites[501]}
    strategy = federate(owner, nodes, base("scaffold", fraction_evaluate=0.0), 1)
    assert "scaffold needs tune.optimizer = 'sgd', got 'adamw'" in reasons(strategy)[0]
    nodes = {500: {**sites[500], "tune.lora-rank": 1}, 501: sites[501]}
    strategy = federate(owner, nodes, base("ditto", fraction_evaluate=0.0), 1, tune=LORA)
    assert "tune.lora-rank can't be set for one site under ditto" in reasons(strategy)[0]


def test_privacy_mods_and_control_variates_do_not_mix(owner: ModelOwner, sites: dict[int, Any]) -> None:
    app = make_client_app(train_mods=[LocalDpMod(1.0, 1.0, 1.0, 1e-5)])
    strategy = federate(owner, sites, base("scaffold", fraction_evaluate=0.0), 1, app=app)
    assert all("a privacy mod would count what scaffold sends" in reason for reason in reasons(strategy)[:2])
    app = make_client_app(train_mods=[LocalDpMod(1.0, 1e-6, 1.0, 1e-5)])
    assert not reasons(federate(owner, sites, base("fedper", fraction_evaluate=0.0), 1, app=app))


def test_an_algorithm_that_the_site_does_not_know(owner: ModelOwner, sites: dict[int, Any]) -> None:
    class Newer(Ditto):
        def _ask(self, part: Any, config: Any) -> None:
            super()._ask(part, config)
            config["local.algorithm"] = "dittto"

    strategy = federate(owner, sites, Newer(fraction_evaluate=0.0), 1)
    assert "unknown local algorithm 'dittto'; did you mean 'ditto'" in reasons(strategy)[0]


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_short_codecs(owner: ModelOwner, sites: dict[int, Any], codec: str) -> None:
    exact = federate(owner, sites, base("scaffold", fraction_evaluate=0.0), 2).update().tensors
    short = federate(owner, sites, base("scaffold", fraction_evaluate=0.0), 2, codec=codec)
    assert not reasons(short)
    found = short.update().tensors
    assert 0 < max(float((exact[name] - found[name]).abs().max()) for name in exact) < 0.03


@pytest.mark.parametrize("tune", [SGD, LORA], ids=["full", "lora"])
def test_fedprox_by_name_reaches_the_client(
    owner: ModelOwner, sites: dict[int, Any], tune: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = DataOwner.tune

    def spy(self: DataOwner, source: Any, config: TuneConfig, **options: Any) -> Any:
        seen.append(config.proximal_mu)
        return real(self, source, config, **options)

    monkeypatch.setattr(DataOwner, "tune", spy)
    found = {}
    for spec in ("fedprox:proximal-mu=0.1", "fedprox:proximal-mu=8", "fedavg"):
        counts = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}
        more = dataclasses.replace(tune, max_steps=6, clip_norm=0.0, validation_share=0.0)
        found[spec] = federate(owner, sites, make_strategy(spec, **counts), 1, tune=more).update().tensors
    assert seen == [0.1, 0.1, 8.0, 8.0, 0.0, 0.0]
    start = owner.initial_state(tune.lora, tune.seed)

    def moved(values: Any) -> float:
        return sum(float((values[name] - start[name]).square().sum()) for name in start) ** 0.5

    assert moved(found["fedprox:proximal-mu=8"]) < moved(found["fedprox:proximal-mu=0.1"]) < moved(found["fedavg"])
