"""Cells as JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from offsite_fl.choosing.results import Cell, RateTried, ScaleTried
from offsite_fl.errors import DataError
from tests.choosing.conftest import cell, right


def through_json(given: Cell) -> Cell:
    return Cell.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False)))


def test_round_trip() -> None:
    given = cell(scales=(ScaleTried(0.5, 3.0, 3.5),))
    assert given.tuned is not None and given.built is not None
    tuned = replace(given.tuned, rates=(RateTried(1e-3, 4.0), RateTried(1.0, None)))
    given = replace(given, tuned=tuned, built=replace(given.built, peak_bytes=5, notes=("a", "b")))
    assert through_json(given) == given
    failed = cell(error="no room")
    assert through_json(failed) == failed


def test_accuracies_and_cells_from_before_there_were_any() -> None:
    given = cell(accuracy=right(0.5, 0.4, 0.8), without_repair=3.4)
    assert through_json(given) == given
    old = cell().to_dict()
    del old["tuned"]["accuracy"], old["tuned"]["without_repair"]
    assert Cell.from_dict(old) == cell()


def test_a_loss_that_is_no_number() -> None:
    given = cell(tuned=(math.inf, math.nan))
    assert given.to_dict()["tuned"]["plug_in"] is None
    found = through_json(given).tuned
    assert found is not None and math.isnan(found.plug_in)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "0"}, r"cell\.seed must be a whole number"),
        ({"role": "other"}, r"cell\.role must be one of candidate, uncompressed, full-fine-tuning"),
        ({"tuned": {"rate": 1}}, r"cell\.tuned lacks"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_what_is_no_cell(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Cell.from_dict(cell().to_dict() | changes)
