"""FedBiOT taken apart: what is measured of it, each part without the others, and settings that don't go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from offsite_fl.client_app import make_client_app
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.measure import Measure
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import FedBiOT, OffsiteTuning, central_evaluation
from offsite_fl.strategies.named import make_strategy
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_clients import (
    own_process,  # noqa: F401  (fixtures)
    owner_with_bundle,
    reasons,
)

from .fedbiot_sites import PUBLIC, TUNE, fedbiot, last_block_owner, sites, strategy_for  # noqa: F401  (fixtures)

# Measuring ----------------------------------------------------------------------------------------------------------


def test_the_emulator_row_is_of_the_patched_emulator_and_the_plug_in_is_not(
    owner: ModelOwner, nodes: dict[int, Any]
) -> None:
    measure = Measure(owner, PUBLIC, block_size=12, device="cpu")
    strategy = strategy_for(owner, fedbiot(first_steps=30))
    evaluate = central_evaluation(measure, strategy.lora, patch=lambda: strategy.patch)
    result = strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=1, evaluate_fn=evaluate)
    metrics = result.evaluate_metrics_serverapp
    alone = DataOwner.open(owner.bundle, "float32")  # type: ignore[arg-type]
    assert metrics[0]["emulator_loss"] == pytest.approx(evaluate_loss(alone.model, measure.batches).loss)
    values = owner.adapter_values(strategy.state, strategy.lora)
    alone.load_adapter(values)
    bare = evaluate_loss(alone.model, measure.batches).loss
    alone.patch(strategy.patch)
    patched = evaluate_loss(alone.model, measure.batches).loss
    assert metrics[1]["emulator_loss"] == pytest.approx(patched) and abs(patched - bare) > 1e-3
    with owner.plugged_in(values) as full:
        assert metrics[1]["plug_in_loss"] == pytest.approx(evaluate_loss(full, measure.batches).loss)
    assert measure.emulator_zero_shot().loss == pytest.approx(float(metrics[0]["emulator_loss"]))


# Taken apart --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("realign", "steps"),
    [(1, [5, 2, 2, 2, 2]), (2, [5, 0, 2, 0, 2]), (3, [5, 0, 0, 2, 0]), (0, [5, 0, 0, 0, 0]), (-1, [0] * 5)],
)
def test_steps_before_each_broadcast(realign: int, steps: list[int]) -> None:
    base = FedBiOT(first_steps=5, align_steps=2, realign=realign)
    assert [base.steps_before(server_round) for server_round in range(1, 6)] == steps


def test_as_the_paper_has_it_500_steps_first_and_10_before_each_later_round() -> None:
    assert [FedBiOT().steps_before(server_round) for server_round in range(1, 5)] == [500, 10, 10, 10]


@pytest.mark.parametrize(("realign", "sent"), [(0, [500, 501]), (2, [500, 501]), (-1, []), (1, [500, 501, 500, 501])])
def test_a_patch_travels_only_when_it_is_new(
    owner: ModelOwner, nodes: dict[int, Any], realign: int, sent: list[int]
) -> None:
    grid = FakeGrid(make_client_app(), nodes)
    strategy = strategy_for(owner, fedbiot(realign=realign))
    strategy.start(grid, num_rounds=2)
    assert not reasons(strategy) and grid.types("train.patch") == sent
    assert (strategy.patch is None) == (realign == -1)


def test_without_epsilon_and_alignment_it_is_fedavg(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    one = strategy_for(owner, fedbiot(epsilon=0.0, realign=-1), public=None)
    other = strategy_for(owner, FedAvg(fraction_evaluate=0.0, **all_nodes(2)), public=None)
    for strategy in (one, other):
        strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=2)
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_whole_adapters_evaluation_and_wrappers(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """A full adapter, a streaming mean, and a privacy wrapper around it; sites evaluate on the patched emulator too."""
    tune = replace(TUNE, lora_rank=0, validation_share=0.3)
    plain = strategy_for(owner, fedbiot(fraction_evaluate=1.0), tune=tune, streaming=True)
    plain.start(FakeGrid(make_client_app(), nodes), num_rounds=2)
    assert not reasons(plain) and "evaluate_loss" in plain.history[2].clients["a"]
    private = strategy_for(owner, DifferentialPrivacyServerSideFixedClipping(fedbiot(), 0.1, 10.0, 2))
    private.start(FakeGrid(make_client_app(), nodes), num_rounds=1)
    assert not reasons(private) and private.patch is not None


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (fedbiot, {"public": None}, "give it as public, or take fedbiot:realign=-1"),
        (fedbiot, {"tune": replace(TUNE, proximal_mu=0.1)}, "leave out tune.proximal-mu = 0.1"),
        (lambda: fedbiot(realign=-2), {}, "0 for once or -1 for never, got -2"),
        (lambda: fedbiot(placement="first"), {}, "placement must be last or any"),
        (lambda: fedbiot(align_optimizer="rmsprop"), {}, "optimizer = 'rmsprop'"),
        (lambda: fedbiot(align_targets="q_prj"), {}, "did you mean 'q_proj'"),
    ],
)
def test_wrong_settings_are_named(owner: ModelOwner, make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy_for(owner, make(), **options)


def test_the_adapter_must_be_the_last_blocks_unless_any_will_do(tmp_path: Path) -> None:
    owner = owner_with_bundle(tmp_path)
    with pytest.raises(ConfigError, match=r"the split is .*: set it to 0-2, or take fedbiot:placement=any"):
        strategy_for(owner)
    assert strategy_for(owner, fedbiot(placement="any")).patch is None


def test_what_is_aligned_can_be_said_by_name(owner: ModelOwner) -> None:
    base = make_strategy("fedbiot:hidden=layerwise,kl-temperature=2")
    assert strategy_for(owner, base).base is base and isinstance(base, FedBiOT) and base.aligner is not None
    assert (base.aligner.options.hidden, base.aligner.options.kl_temperature) == ("layerwise", 2.0)
    for spec, said in (("hidden=l2", "hidden = 'l2' isn't possible"), ("kl-temperature=0", "kl_temperature must be")):
        with pytest.raises(ConfigError, match=said):
            make_strategy(f"fedbiot:{spec}")


def test_by_name() -> None:
    made = make_strategy("fedbiot:epsilon=1.0,lambda-kl=0,realign=0,align-targets=q_proj/v_proj,fraction-train=0.5")
    assert isinstance(made, FedBiOT) and (made.epsilon, made.lambda_kl, made.realign) == (1.0, 0.0, 0)
    assert made._alignment(16, 1).targets == ("q_proj", "v_proj") and made.fraction_train == 0.5


def test_a_message_without_fedbiot_names_no_patch(owner: ModelOwner) -> None:
    config = ConfigRecord()
    OffsiteTuning(FedAvg(), owner, tune=TUNE).patching.sign(config)
    assert not config
