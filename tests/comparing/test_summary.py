"""Standings, the lead and its test, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from offsite_fl.comparing.cells import Condition, cells
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.comparing.summary import Summary
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.evaluation.rows import Row
from tests.comparing.conftest import FEDADAM, FEDAVG, FULL, ZERO, grid_table, measured, whole_grid


def test_the_cells_of_a_grid(settings: GridSettings) -> None:
    found = cells(settings)
    assert len(found) == 1 + 2 + 2 * 2 * 2  # zero-shot once, full fine-tuning by seed, strategies by everything
    assert len(set(found)) == len(found)
    assert {cell.seed for cell in found[: len(found) // 2]} == {0}


def test_references_that_do_not_depend_on_the_partition_are_one_cell() -> None:
    table = grid_table() | {"baselines": {"run": ["alone", "pooled", "uncompressed", "full-lora"]}}
    roles = [cell.arm.role for cell in cells(GridSettings.of(table))]
    assert [roles.count(role) for role in ("alone", "pooled", "uncompressed", "full-lora")] == [4, 2, 4, 4]


def test_a_standing_by_hand(settings: GridSettings) -> None:
    own = [measured(FEDAVG, 3.0), measured(FEDAVG, 3.4, seed=1), measured(ZERO, 4.0), measured(FULL, 2.0)]
    summary = Summary.of(settings, own)
    standing = next(s for s in summary.by_condition[Condition("iid", 2, 1.0, "")] if s.arm == FEDAVG)
    assert standing.plug_in is not None and standing.gap is not None and standing.recovered is not None
    assert standing.plug_in.mean == pytest.approx(3.2)
    assert standing.plug_in.std == pytest.approx(math.sqrt(2 * 0.2**2 / 1))
    assert standing.gap.values == pytest.approx((2.0, 1.6))
    assert standing.recovered.values == pytest.approx((0.5,))  # full fine-tuning with seed 1 isn't there
    assert standing.worst is not None and standing.worst.values == pytest.approx((3.5, 3.9))
    assert standing.spread is not None and standing.spread.mean == pytest.approx(0.5)
    assert (standing.down, standing.up) == (2 * 10 + 2 * 1000, 2 * 7)
    assert standing.seconds == pytest.approx(2 * 2 * 1.5) and standing.peak == 100


def test_the_lead_and_its_test(settings: GridSettings) -> None:
    summary = Summary.of(settings, whole_grid())
    assert summary.lead is not None and summary.lead.paired is not None
    assert summary.lead.best == FEDAVG and summary.lead.second == FEDADAM
    assert sorted(summary.lead.paired.differences) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert summary.lead.paired.p == 2 / 16
    assert [arm for arm, _ in summary.overall] == [FEDAVG, FEDADAM] and not summary.missing and not summary.failed
    assert Summary.of(settings, whole_grid(better="fedadam")).lead.best == FEDADAM  # type: ignore[union-attr]


def test_a_strategy_that_failed_somewhere_cannot_lead(settings: GridSettings) -> None:
    cells_ = whole_grid()
    broken = next(i for i, m in enumerate(cells_) if m.cell.arm == FEDAVG)
    cells_[broken] = dataclasses.replace(cells_[broken], error="it broke")
    summary = Summary.of(settings, cells_)
    assert summary.lead is not None and summary.lead.best == FEDADAM and summary.lead.paired is None
    assert len(summary.failed) == 1
    first = next(iter(summary.by_condition.values()))
    assert any(s.errors == ("it broke",) for s in first)


def test_a_strategy_that_diverged_is_last_and_cannot_lead(settings: GridSettings) -> None:
    cells_ = whole_grid()
    index = next(i for i, m in enumerate(cells_) if m.cell.arm == FEDAVG)
    cells_[index] = dataclasses.replace(cells_[index], rounds=(RoundRecord(2, Row(math.nan)),))
    summary = Summary.of(settings, cells_)
    assert summary.lead is not None and summary.lead.best == FEDADAM
    assert next(iter(summary.by_condition.values()))[-1].arm == FEDAVG


def test_nothing_measured(settings: GridSettings) -> None:
    summary = Summary.of(settings, [])
    assert summary.lead is None and summary.missing == 11 and not summary.overall
