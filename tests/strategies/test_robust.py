"""Bounds that compare the replies of a round: by hand, against a slow plain version, and through whole rounds."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite_fl.errors import CheckpointError, ConfigError
from offsite_fl.strategies import robust
from offsite_fl.strategies.offsite_tuning import OffsiteTuning
from offsite_fl.strategies.robust import Bounds, compare, cosines_to_median, medians_of_others
from offsite_fl.strategies.screening import Screened
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, run, sites, wrap

VALUES = 5
Update = Sequence[float]  # five values: four for adapter.0.w, one for adapter.1.b


def tensors(update: Update) -> dict[str, torch.Tensor]:
    w, b = torch.tensor(update[:4]).reshape(2, 2), torch.tensor(update[4:])
    return {"adapter.0.w": FIRST["adapter.0.w"] + w, "adapter.1.b": FIRST["adapter.1.b"] + b}


def message(update: Update) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord(tensors(update))}), 1, "train")


def screened(updates: Mapping[int, Update]) -> Screened:
    norms = {node: math.sqrt(sum(value**2 for value in update)) for node, update in updates.items()}
    return Screened([(node, message(update)) for node, update in updates.items()], [], norms)


def kept(found: Screened) -> set[int]:
    return {node for node, _ in found.good}


def reason(found: Screened, node: int) -> str:
    return dict(found.bad)[node]


def of_norm(norm: float) -> Update:
    return (norm, 0.0, 0.0, 0.0, 0.0)


# By hand ---------------------------------------------------------------------------------------------------------


def test_norms_are_held_against_the_median_norm() -> None:
    # norms 1, 2, 3, 7: the median is 2.5, twice that is 5
    updates = {1: of_norm(1), 2: of_norm(2), 3: of_norm(-3), 4: of_norm(7)}
    found = compare(screened(updates), FIRST, Bounds(max_norm_ratio=2.0))
    assert kept(found) == {1, 2, 3}
    assert reason(found, 4) == "the update's norm is 7, the bound is 2 times the round's median 2.5"
    # exactly at the bound stays
    assert kept(compare(screened(updates), FIRST, Bounds(max_norm_ratio=2.8))) == {1, 2, 3, 4}


def test_cosines_by_hand() -> None:
    # the median of two others is their mean: (0, 1, 0, 0, 0.5), (0, 0.5, 0, 0, 0.5) and (1, 0.5, 0, 0, 0)
    updates = [(1.0, 0, 0, 0, 0), (1.0, 1.0, 0, 0, 0), (-1.0, 1.0, 0, 0, 1.0)]
    found = cosines_to_median([message(update) for update in updates], FIRST)
    assert found == pytest.approx([0.0, 0.5, -0.5 / math.sqrt(3 * 1.25)])


def test_the_middle_one_of_three_others() -> None:
    # first coordinates 1, 2, 4, -9: the medians of the others are 2, 1, 1, 2; second 0, 0, 0, 8: all 0
    updates = [(1.0, 0, 0, 0, 0), (2.0, 0, 0, 0, 0), (4.0, 0, 0, 0, 0), (-9.0, 8.0, 0, 0, 0)]
    found = cosines_to_median([message(update) for update in updates], FIRST)
    assert found == pytest.approx([1.0, 1.0, 1.0, -9 / math.sqrt(81 + 64)])


def test_the_flipped_one_is_dropped_with_value_and_bound() -> None:
    updates = {1: of_norm(1), 2: of_norm(1), 3: (-3.0, 4.0, 0, 0, 0), 4: of_norm(2)}
    found = compare(screened(updates), FIRST, Bounds(min_cosine=0.25))
    assert kept(found) == {1, 2, 4}
    assert reason(found, 3) == "the update's cosine with the median of the others' is -0.6, the bound is 0.25"


def test_a_cosine_at_the_bound_stays() -> None:
    updates = {1: of_norm(1), 2: of_norm(1), 3: (0.0, 2.0, 0, 0, 0), 4: of_norm(3)}
    assert kept(compare(screened(updates), FIRST, Bounds(min_cosine=0.0))) == {1, 2, 3, 4}
    assert kept(compare(screened(updates), FIRST, Bounds(min_cosine=1e-9))) == {1, 2, 4}


def test_the_length_of_an_update_is_no_matter_for_its_direction() -> None:
    updates = {1: (1.0, 1.0, 0, 0, 0), 2: (1.0, 0.9, 0, 0, 0), 3: (50.0, 50.0, 0, 0, 0), 4: (0.9, 1.0, 0, 0, 0)}
    assert kept(compare(screened(updates), FIRST, Bounds(min_cosine=0.99))) == {1, 2, 3, 4}


def test_what_has_nothing_in_common_has_a_cosine_of_zero() -> None:
    """Independent directions: with the median of all, an update's own part in it would make 1 / sqrt(5) = 0.45."""
    vectors = np.random.default_rng(0).normal(size=(5, 40_000)).astype(np.float32)
    replies = [
        Message(RecordDict({"arrays": ArrayRecord({"w": torch.from_numpy(row)})}), 1, "train") for row in vectors
    ]
    found = cosines_to_median(replies, {"w": torch.zeros(40_000)})
    assert all(abs(cosine) < 5 / math.sqrt(40_000) for cosine in found)


@pytest.mark.parametrize("least", [-1.0, 0.5])
def test_a_free_rider_has_a_reason_of_its_own(least: float) -> None:
    updates = {1: of_norm(1), 2: of_norm(2), 3: of_norm(3), 4: (0.0,) * 5}
    found = compare(screened(updates), FIRST, Bounds(min_cosine=least))
    assert kept(found) == {1, 2, 3} and "an update of zero has no direction (a free rider" in reason(found, 4)


def test_free_riders_do_not_count_towards_the_median() -> None:
    # with the two zeros the median of the others of 1 would be 0, without them it is 2
    updates = {1: of_norm(1), 2: of_norm(2), 3: of_norm(2), 4: of_norm(-9), 5: of_norm(0), 6: of_norm(0)}
    assert kept(compare(screened(updates), FIRST, Bounds(min_cosine=0.5))) == {1, 2, 3}


@pytest.mark.parametrize(("bounds", "count"), [(Bounds(max_norm_ratio=1.1), 3), (Bounds(min_cosine=1.0), 4)])
def test_too_few_replies_are_not_compared(
    bounds: Bounds, count: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="flwr.offsite")
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    updates = {i: of_norm(1) for i in range(1, count - 1)} | {9: (-9.0, 3.0, 0, 0, 0)}
    assert kept(compare(screened(updates), FIRST, bounds)) == set(updates)
    assert f"isn't applied: {count - 1} good replies, {count} are needed" in caplog.text
    assert 9 not in kept(compare(screened(updates | {count: of_norm(1)}), FIRST, bounds))


def test_a_median_norm_of_zero_compares_nothing() -> None:
    idle = {1: of_norm(0), 2: of_norm(0), 3: of_norm(1)}
    assert kept(compare(screened(idle), FIRST, Bounds(max_norm_ratio=2.0))) == {1, 2, 3}


def test_norms_come_first() -> None:
    """A reply that fails both is dropped once, for its norm."""
    updates = {1: of_norm(1), 2: of_norm(1), 3: of_norm(1), 4: (0, 1.0, 0, 0, 0), 5: (0, 90.0, 0, 0, 0)}
    found = compare(screened(updates), FIRST, Bounds(max_norm_ratio=3.0, min_cosine=0.5))
    assert kept(found) == {1, 2, 3} and "norm" in reason(found, 5) and "cosine" in reason(found, 4)


def slowly(updates: np.ndarray) -> list[float]:
    found = []
    for i, row in enumerate(updates):
        others = [other for j, other in enumerate(updates) if j != i]
        middle = [statistics.median(column) for column in zip(*others, strict=True)]
        product = sum(a * b for a, b in zip(row, middle, strict=True))
        found.append(product / math.sqrt(sum(a * a for a in row) * sum(b * b for b in middle)))
    return found


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("chunk", [1, 3, 2**18])
def test_in_pieces_as_in_one_slow_loop(chunk: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "CHUNK", chunk)
    updates = np.random.default_rng(0).normal(size=(count, VALUES)).astype(np.float32)
    found = cosines_to_median([message(row.tolist()) for row in updates], FIRST)
    assert found == pytest.approx(slowly(updates.astype(np.float64)), abs=1e-5)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=2, max_size=9))
@settings(max_examples=80, deadline=None)
def test_medians_of_others_with_ties(rows: list[list[int]]) -> None:
    values = np.array(rows, dtype=np.float64)
    slow = np.stack([np.median(np.delete(values, i, axis=0), axis=0) for i in range(len(values))])
    assert np.array_equal(medians_of_others(values), slow)


# Through rounds ----------------------------------------------------------------------------------------------------


def grid_of(updates: Mapping[str, Update]) -> FakeGrid:
    """Sites a, b, c... whose replies are the first adapter with these updates."""

    def tamper(reply: Message) -> Message:
        name = reply.content["config"].get("client") if reply.metadata.message_type == "train" else None
        for key, value in tensors(updates[str(name)]).items() if name in updates else ():
            reply.content["arrays"][key] = Array(value.numpy())
        return reply

    return FakeGrid(Adder(lambda node, r: 0.0), sites(len(updates)), tamper)


def strategy_of(count: int, **options: object) -> OffsiteTuning:
    return wrap(FedAvg(fraction_evaluate=0.0, **all_nodes(count)), **options)


def test_clipping_in_a_round_by_hand() -> None:
    # norms 5 and 1; clipped to 2.5 the first is (1.5, 0, 0, 0, 2)
    strategy = strategy_of(2, clip_update_norm=2.5)
    after = run(strategy, grid_of({"a": (3.0, 0, 0, 0, 4.0), "b": (0, 0, 0, 1.0, 0)}))
    assert torch.allclose(after["adapter.0.w"], FIRST["adapter.0.w"] + torch.tensor([[0.75, 0.0], [0.0, 0.5]]))
    assert torch.allclose(after["adapter.1.b"], FIRST["adapter.1.b"] + 1.0)
    record = strategy.history[1]
    assert record.clipped == 1 and not record.dropped and not record.skipped


def test_dropping_comes_before_clipping_and_ratios_are_of_what_came() -> None:
    updates = {"a": of_norm(1), "b": of_norm(2), "c": of_norm(3), "d": of_norm(20), "e": of_norm(80)}
    strategy = strategy_of(5, max_update_norm=50.0, clip_update_norm=1.5, max_norm_ratio=4.0)
    after = run(strategy, grid_of(updates))
    # e is over 50; of 1, 2, 3, 20 the median is 2.5, so d is over 10; of 1, 2, 3 two are clipped to 1.5
    assert {dropped.node for dropped in strategy.history[1].dropped} == {"d", "e"}
    assert strategy.history[1].clipped == 2
    assert float(after["adapter.0.w"][0, 0]) == pytest.approx(1.0 + (1 + 1.5 + 1.5) / 3)


def test_screening_by_cosine_in_a_round() -> None:
    strategy = strategy_of(4, min_cosine=0.0)
    after = run(strategy, grid_of({"a": of_norm(1), "b": of_norm(2), "c": of_norm(3), "d": of_norm(-90)}))
    assert [dropped.node for dropped in strategy.history[1].dropped] == ["d"]
    assert float(after["adapter.0.w"][0, 0]) == pytest.approx(1.0 + 2.0)
    assert set(strategy.history[1].clients) == {"a", "b", "c"}


def test_too_few_that_agree_leave_the_adapter() -> None:
    strategy = strategy_of(4, min_cosine=0.9, min_results=4)
    after = run(strategy, grid_of({"a": of_norm(1), "b": of_norm(2), "c": of_norm(-3), "d": of_norm(1)}))
    assert strategy.history[1].skipped and torch.equal(after["adapter.0.w"], FIRST["adapter.0.w"])


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_a_free_rider_under_every_codec(codec: str) -> None:
    """What went down and comes back in the same codec is the same values, so an update of zero stays one."""
    amounts = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 0.0}
    adder = Adder(lambda node, r: amounts[node["name"]], reference=dict(FIRST))
    strategy = strategy_of(4, codec=codec, min_cosine=0.0)
    run(strategy, FakeGrid(adder, sites(4)))
    assert [dropped.node for dropped in strategy.history[1].dropped] == ["d"]


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_update_norm": 0.0}, "clip-update-norm must be above 0"),
        ({"clip_update_norm": math.inf}, "clip-update-norm must be above 0"),
        ({"max_norm_ratio": 1.0}, "max-norm-ratio must be above 1"),
        ({"min_cosine": 1.1}, "min-cosine must lie from -1 to 1, got 1.1"),
        ({"min_cosine": math.nan}, "min-cosine must lie from -1 to 1"),
        ({"max_update_norm": -1.0}, "max-update-norm must be above 0"),
    ],
)
def test_bounds_that_bound_nothing(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strategy_of(3, **options)


@pytest.mark.parametrize("name", ["clip_update_norm", "max_norm_ratio", "min_cosine"])
def test_a_run_is_resumed_with_the_same_bounds(name: str, tmp_path: Path) -> None:
    value = 1.0 if name == "min_cosine" else 1.5
    run(strategy_of(3, run_dir=tmp_path, **{name: value}), grid_of({"a": of_norm(1), "b": of_norm(1), "c": of_norm(1)}))
    with pytest.raises(CheckpointError, match=name.replace("_", "-")):
        run(strategy_of(3, run_dir=tmp_path, resume=True), grid_of({}), 2)
