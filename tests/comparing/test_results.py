"""What a cell costs and reaches, by hand, and its line of JSON."""

from __future__ import annotations

import json
import math

import pytest

from offsite_fl.comparing.results import Measured
from offsite_fl.errors import CheckpointError, DataError
from offsite_fl.evaluation.lines import LineStore
from tests.comparing.conftest import FEDAVG, FULL, ZERO, measured


def test_points_add_up_what_was_spent_so_far() -> None:
    found = measured(FEDAVG, 3.0)
    assert [(p.round, p.plug_in) for p in found.points()] == [(0, 4.0), (1, 3.5), (2, 3.0)]
    # 17 bytes a round; a bundle of 1000 for each of two clients before the first; two clients of 1.5 s a round.
    assert [p.bytes for p in found.points()] == [0, 2000 + 17, 2000 + 34]
    assert [p.client_seconds for p in found.points()] == [0.0, 3.0, 6.0]
    assert found.zero_shot == 4.0 and found.gap == 2.0 and found.client_seconds == 6.0
    assert (found.down, found.up) == (2020, 14)


def test_fairness_is_over_clients() -> None:
    found = measured(FEDAVG, 3.0, by_client={"client-0": 1.0, "client-1": 2.0, "client-2": 6.0})
    assert found.worst_client == 6.0
    assert found.spread == pytest.approx(math.sqrt((4 + 1 + 9) / 3))
    assert measured(FULL, 2.0).spread is None and measured(FULL, 2.0).worst_client is None


@pytest.mark.parametrize("arm", [FEDAVG, FULL, ZERO])
def test_a_line_reads_back_what_was_written(arm) -> None:  # type: ignore[no-untyped-def]
    found = measured(arm, 3.0)
    again = Measured.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict() and again.cell == found.cell and again.points() == found.points()


def test_lines_that_are_none() -> None:
    table = measured(FEDAVG, 3.0).to_dict()
    for key, value in (("role", "strateggy"), ("seed", -1), ("peak_bytes", "x"), ("rounds", 3)):
        with pytest.raises(DataError, match=key):
            Measured.from_dict(table | {key: value})
    with pytest.raises(DataError, match="lacks"):
        Measured.from_dict({"key": "x"})


def test_the_store_keeps_what_is_whole_and_tries_failures_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "cells.jsonl"
    store: LineStore[Measured] = LineStore(path, Measured.from_dict)
    good, bad = measured(FEDAVG, 3.0), measured(FEDAVG, None, seed=1)
    store.add(good)
    store.add(bad)
    with path.open("a") as file:
        file.write('{"key": "cut off')
    again: LineStore[Measured] = LineStore(path, Measured.from_dict)
    assert len(again) == 2 and again.get(good.key) is not None
    assert again.get(bad.key) is None and again.failed(bad.key) is not None and again.failed(good.key) is None
    assert path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("[]\n")
    with pytest.raises(CheckpointError, match="line 3"):
        LineStore(path, Measured.from_dict)
