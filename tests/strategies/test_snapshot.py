"""State of strategies as plain data: everything that is data comes back, the rest is the constructor's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
)
from hypothesis import given
from hypothesis import strategies as st

from offsite_fl.errors import CheckpointError
from offsite_fl.strategies import FedNova, Scaffold, rng
from offsite_fl.strategies.snapshot import nested, put, rollback_point, settings, take

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars | st.lists(st.floats(width=32), max_size=3).map(lambda v: np.array(v, np.float32)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@given(values)
def test_any_nest_of_data_survives_json(value: Any) -> None:
    old, new = FedAvg(), FedAvg()
    old.extra = value  # type: ignore[attr-defined]
    table, arrays = take(old)
    put(new, json.loads(json.dumps(table)), arrays)
    assert same(value, new.extra)  # type: ignore[attr-defined]


def test_every_kind_of_value() -> None:
    old, new = FedAdam(eta=0.5), FedAdam(eta=0.5)
    kept = {
        "m_t": {"adapter.0.w": np.ones((2, 3))},
        "current_arrays": ArrayRecord({"b": torch.ones(2), "a": torch.zeros(())}),
        "half": torch.ones(2, 2, dtype=torch.bfloat16),
        "nought": torch.tensor(3.0),
        "scalar": np.float64(0.1),
        "zero_d": np.array(1.5),
        "pair": (1, float("inf"), "x"),
        "by_round": {1: 0.5, 2: 0.25},
    }
    vars(old).update(kept)
    table, arrays = take(old)
    put(new, json.loads(json.dumps(table)), arrays)
    got = vars(new)
    assert list(got["current_arrays"]) == ["b", "a"] and got["current_arrays"]["a"].numpy().shape == ()
    assert torch.equal(got["half"], kept["half"]) and got["nought"].item() == 3.0  # type: ignore[arg-type]
    assert type(got["scalar"]) is np.float64 and got["scalar"] == 0.1
    assert got["zero_d"].shape == () and got["pair"] == kept["pair"] and got["by_round"] == kept["by_round"]
    assert np.array_equal(got["m_t"]["adapter.0.w"], np.ones((2, 3)))


def test_functions_and_objects_stay_the_constructor_s() -> None:
    old = FedAvg()
    old.hook, old.thing, old.keyed = print, object(), {(1, 2): 3}  # type: ignore[attr-defined]
    table, _ = take(old)
    assert not {"hook", "thing", "keyed", "train_metrics_aggr_fn"} & set(table)


class Accountant:
    """The part of Flower's privacy accountants that matters here."""

    def __init__(self) -> None:
        self.compositions: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"compositions": list(self.compositions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.compositions = list(state["compositions"])


def adaptive() -> DifferentialPrivacyServerSideAdaptiveClipping:
    return DifferentialPrivacyServerSideAdaptiveClipping(FedAdam(), 0.0, 3, initial_clipping_norm=0.5)


def test_wrapped_strategies_and_accountants() -> None:
    old, new = adaptive(), adaptive()
    old.clipping_norm, old.strategy.m_t = 0.125, {"w": np.ones(2)}  # type: ignore[attr-defined]
    old.accountant, new.accountant = Accountant(), Accountant()  # type: ignore[attr-defined]
    old.accountant.compositions.append(1.5)  # type: ignore[attr-defined]
    table, arrays = take(old)
    put(new, json.loads(json.dumps(table)), arrays)
    assert new.clipping_norm == 0.125 and new.strategy.m_t["w"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
    assert new.accountant.compositions == [1.5]  # type: ignore[attr-defined]
    assert [type(s).__name__ for s in nested(new)] == [type(new).__name__, "FedAdam"]
    del new.strategy
    with pytest.raises(CheckpointError, match="wrapped strategy in 'strategy'"):
        put(new, table, arrays)


def test_settings_name_class_and_scalars_of_all_layers() -> None:
    table = settings(adaptive())
    assert table["clipping_norm"] == 0.5 and table["strategy.class"] == "FedAdam" and table["strategy.eta"] == 0.1
    assert "strategy.min_available_nodes" not in table  # an operator may change it


def test_a_rollback_point_undoes_all_layers() -> None:
    strategy = adaptive()
    strategy.strategy.v_t = {"w": np.ones(1)}  # type: ignore[attr-defined]
    undo = rollback_point(strategy)
    strategy.clipping_norm = 99.0
    strategy.strategy.v_t["w"] = np.zeros(1)  # type: ignore[attr-defined]
    strategy.strategy.late = 1  # type: ignore[attr-defined]
    undo()
    assert strategy.clipping_norm == 0.5 and strategy.strategy.v_t["w"].tolist() == [1.0]  # type: ignore[attr-defined]
    assert not hasattr(strategy.strategy, "late")


def test_random_states_go_on_where_they_were() -> None:
    import random

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), float(torch.rand(()))]

    draw()
    state = json.loads(json.dumps(rng.rng_state()))
    first = draw()
    rng.set_rng_state(state)
    assert draw() == first
    with pytest.raises(CheckpointError, match="random state"):
        rng.set_rng_state({"python": 1})


@pytest.mark.parametrize("strategy", [Scaffold(), FedNova()], ids=["scaffold", "fednova"])
def test_what_each_round_sets_anew_is_no_state(strategy: Any) -> None:
    """The adapter that a round began with is in the checkpoint already."""
    strategy.current = ArrayRecord({"w": torch.ones(2)})
    table, arrays = take(strategy)
    assert "current" not in table and not any(name.startswith("base.current") for name in arrays)
