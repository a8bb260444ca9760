"""LoRA strategies with real pico data owners: two rounds against what their own tuning calls handed back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.local.open_network import networks
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.central import central_evaluation
from offsite_fl.strategies.named import make_strategy
from offsite_fl.tuning.lora import merge_lora
from offsite_fl.update import Update
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_clients import one_owner, own_process, owner_with_bundle, reasons, two_sites  # noqa: F401  (fixtures)

TUNE = TuneConfig(
    max_steps=2,
    lr=1e-2,
    batch_size=2,
    block_size=12,
    lora_rank=2,
    lora_alpha=8.0,
    validation_share=0.3,
    progress=False,
    device="cpu",
)
NAMES = ["flora", "flexlora", "ffa-lora", "rolora"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    """A model whose linears are stored [out, in], and one whose are stored [in, out]."""
    return owner_with_bundle(tmp_path_factory.mktemp("either"), family=request.param)


@pytest.fixture
def nodes(tmp_path: Path) -> dict[int, dict[str, Any]]:
    return two_sites(tmp_path, rows=(3, 5))


@dataclasses.dataclass(eq=False)
class Call:
    """One tuning call of a data owner: what it began with, how, and what it handed back."""

    start: dict[str, torch.Tensor]
    config: TuneConfig
    update: Update


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    made: list[Call] = []
    real = DataOwner.tune

    def spy(self: DataOwner, source: Any, config: TuneConfig, *, start: Any, **options: Any) -> Update:
        update = real(self, source, config, start=start, **options)
        made.append(Call({name: value.clone() for name, value in start.items()}, config, update))
        return update

    monkeypatch.setattr(DataOwner, "tune", spy)
    return made


def federate(owner: ModelOwner, nodes: dict[int, dict[str, Any]], name: str, rounds: int, **options: Any) -> Any:
    base = options.pop("base", None) or make_strategy(name, **all_nodes(2), fraction_evaluate=1.0)
    app = options.pop("app", None) or make_client_app()
    evaluate = options.pop("evaluate_fn", None)
    strategy = OffsiteTuning(base, owner, **{"tune": TUNE, **options})
    strategy.start(FakeGrid(app, nodes), num_rounds=rounds, evaluate_fn=evaluate)
    return strategy


def merged(owner: ModelOwner, values: dict[str, torch.Tensor], call: Call) -> dict[str, torch.Tensor]:
    """The full adapter that one call means, merged by peft into ``values``."""
    blocks = owner._adapter_copies()
    with torch.no_grad():
        for slot, block in blocks.items():
            for name, parameter in block.named_parameters():
                parameter.copy_(values[f"adapter.{slot}.{name}"])
    assert call.update.lora is not None
    return merge_lora(blocks, call.update.tensors, call.update.lora)


def mean(owner: ModelOwner, values: dict[str, torch.Tensor], calls: list[Call]) -> dict[str, torch.Tensor]:
    total = sum(call.update.num_examples for call in calls)
    every = [(call.update.num_examples / total, merged(owner, values, call)) for call in calls]
    return {name: sum(share * one[name] for share, one in every) for name in values}  # type: ignore[misc]


def adapters(strategy: OffsiteTuning, owner: ModelOwner) -> dict[str, torch.Tensor]:
    update = strategy.update()
    return owner.adapter_values(update.tensors, update.lora)


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", ["flora", "ffa-lora", "rolora"])
def test_two_rounds_are_exact_averages_of_what_the_owners_tuned(
    either: ModelOwner, nodes: dict[int, Any], calls: list[Call], name: str
) -> None:
    owner = either
    strategy = federate(owner, nodes, name, 2)
    assert not reasons(strategy) and len(calls) == 4
    handed_out = owner.initial_state()
    first = mean(owner, handed_out, calls[:2])
    if name == "flora":  # the second round begins with the merged adapter, and goes on from it
        assert differ(calls[2].start, first) < 1e-6 and differ(calls[2].start, handed_out) > 1e-4
        expected = mean(owner, calls[2].start, calls[2:])
    else:
        expected = mean(owner, handed_out, calls[2:])
    assert differ(adapters(strategy, owner), expected) < 1e-6
    assert differ(expected, first) > 1e-4 and differ(first, handed_out) > 1e-4  # each round did something
    for call in calls:
        frozen = {"ffa-lora": "lora_A", "rolora": "lora_A" if call in calls[:2] else "lora_B"}.get(name, "nothing")
        assert all(torch.equal(call.update.tensors[n], t) for n, t in call.start.items() if frozen in n)
        trained = [n for n in call.update.tensors if frozen not in n]
        assert all(n not in call.start or not torch.equal(call.update.tensors[n], call.start[n]) for n in trained)


def test_flexlora_is_nearer_to_the_average_than_plain_averaging(
    owner: ModelOwner, nodes: dict[int, Any], calls: list[Call]
) -> None:
    handed_out = owner.initial_state()
    distances = {}
    for name in ("flexlora", "fedavg"):
        calls.clear()
        tune = dataclasses.replace(TUNE, max_steps=8, lr=3e-2)
        strategy = federate(owner, nodes, name, 1, tune=tune)
        assert not reasons(strategy)
        expected, found = mean(owner, handed_out, calls), adapters(strategy, owner)
        squares = [float((found[n] - expected[n]).square().sum()) for n in expected]
        distances[name] = sum(squares) ** 0.5
    assert 0 < distances["flexlora"] < distances["fedavg"]


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_plug_in_and_resume(owner: ModelOwner, nodes: dict[int, Any], name: str, tmp_path: Path) -> None:
    whole = federate(owner, nodes, name, 3)
    assert not reasons(whole) and whole.history[3].clients["a"]["evaluate_loss"] > 0
    federate(owner, nodes, name, 1, run_dir=tmp_path / "run")
    networks.clear()
    parts = federate(owner, nodes, name, 3, run_dir=tmp_path / "run", resume=True)
    one, other = whole.update(), parts.update()
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    assert (one.lora is None) == (name == "flora")
    back = Update.load(one.save(tmp_path / "update.safetensors"))
    with owner.plugged_in(back.tensors, back.lora) as model:
        assert model is owner.model


def test_central_evaluation_takes_the_state_s_own_form(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    from offsite_fl.measure import Measure

    measure = Measure(owner, nodes[500]["data"], block_size=12, max_tokens=200)
    probe = OffsiteTuning(make_strategy("flora"), owner, tune=TUNE)
    strategy = federate(owner, nodes, "flora", 1, evaluate_fn=central_evaluation(measure, probe.lora))
    before, after = strategy.history[0].plug_in, strategy.history[1].plug_in
    assert before is not None and after is not None and before.loss != after.loss


def test_bytes_each_way(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    factors = sum(t.numel() * 4 for t in owner.initial_state(TUNE.lora).values())
    trained_b = sum(t.numel() * 4 for n, t in owner.initial_state(TUNE.lora).items() if "lora_B" in n)
    adapter = sum(t.numel() * 4 for t in owner.initial_state().values())
    overhead = 20_000  # settings, names and numpy's headers

    def counted(name: str) -> tuple[int, int]:
        ledger = federate(owner, nodes, name, 1).ledger
        one = {"round": 1, "node": "a"}
        down = ledger.total(kind="adapter", direction="down", **one) / 2  # to tune, and to evaluate
        return int(down), int(ledger.total(kind="update", direction="up", **one))

    expected = {"flora": (adapter, factors), "ffa-lora": (factors, trained_b), "flexlora": (factors, factors)}
    for name, (down, up) in expected.items():
        found = counted(name)
        assert down <= found[0] < down + overhead and up <= found[1] < up + overhead, name
    assert trained_b < 0.6 * factors


@pytest.mark.parametrize("name", [*NAMES, "fedavg"])
def test_a_site_of_a_smaller_rank(owner: ModelOwner, nodes: dict[int, Any], calls: list[Call], name: str) -> None:
    nodes[501]["tune.lora-rank"] = 1
    strategy = federate(owner, nodes, name, 2)
    assert not reasons(strategy)
    small = [call for call in calls if call.config.lora_rank == 1]
    assert len(small) == 2 and len(calls) == 4
    for call in small:
        assert call.config.lora_alpha / call.config.lora_rank == TUNE.lora_alpha / TUNE.lora_rank
        assert all(t.shape[0 if "lora_A" in n else 1] == 1 for n, t in call.update.tensors.items())
    if name == "fedavg":
        return
    # what it handed back counts as its own product of rank 1, at the run's scale
    values = calls[2].start if name == "flora" else owner.initial_state()
    expected = mean(owner, values, calls[2:])
    if name == "flexlora":
        small_share = differ(adapters(strategy, owner), expected)
        assert small_share < 0.5 * differ(expected, values)  # rank 3 cut to 2
    else:
        assert differ(adapters(strategy, owner), expected) < 1e-6
    if name != "flora":
        large = next(call for call in calls[2:] if call.config.lora_rank == 2)
        for key, tensor in small[1].start.items():
            assert torch.equal(tensor, large.start[key][:1] if "lora_A" in key else large.start[key][:, :1])


def test_a_site_can_t_take_a_larger_rank(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    nodes[501]["tune.lora-rank"] = 3
    strategy = federate(owner, nodes, "flexlora", 1)
    assert "must lie from 1 to 2, the rank of the run" in reasons(strategy)[0]


def test_privacy_mods(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """A mod compares a reply with its message: it gets frozen factors as they came, and can't get fresh ones."""
    inner = make_strategy("ffa-lora", **all_nodes(2), fraction_evaluate=0.0)
    base = DifferentialPrivacyClientSideFixedClipping(inner, 0.0, 0.01, 2)
    strategy = federate(owner, nodes, "", 1, base=base, app=make_client_app(train_mods=[fixedclipping_mod]))
    assert not reasons(strategy)
    start, after = owner.initial_state(TUNE.lora, TUNE.seed), strategy.update().tensors
    assert all(torch.equal(start[n], after[n]) for n in start if "lora_A" in n)
    assert 0 < sum(float((after[n] - start[n]).square().sum()) for n in start) ** 0.5 <= 0.0101
    noisy = federate(owner, nodes, "flora", 1, app=make_client_app(train_mods=[LocalDpMod(1.0, 1.0, 1.0, 1e-5)]))
    assert all("fresh LoRA factors are other tensors" in reason for reason in reasons(noisy)[:2])
