"""Which cells run together, and what is taken over from runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offsite_fl.comparing.cells import Arm, Cell, Condition, cells
from offsite_fl.comparing.places import Inputs, Places
from offsite_fl.comparing.results import Measured
from offsite_fl.comparing.run import Comparison, State, shards_of
from offsite_fl.comparing.server_app import Plan, reason
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.lines import append_line
from tests.comparing.conftest import FEDAVG, grid_table, measured


def state(number: int, clients: int | None) -> State:
    return State(str(number), Cell(Arm("strategy", "fedavg", "e"), Condition("iid", clients), number), None)


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_shards_hold_every_cell_once_and_one_number_of_clients(parallel: int) -> None:
    pending = [state(n, clients) for n, clients in enumerate([None, 2, 4, 2, 4, 4, None, 2])]
    batches = list(shards_of(pending, parallel))
    seen = [s.key for batch in batches for shard in batch for s in shard]
    assert sorted(seen) == sorted(s.key for s in pending)
    for batch in batches:
        assert len({s.cell.condition.clients for shard in batch for s in shard} - {None}) == 1
        assert 1 <= len(batch) <= parallel and all(batch)


def test_only_references() -> None:
    assert [len(shard) for batch in shards_of([state(0, None)], 2) for shard in batch] == [1]


def test_lines_of_a_run_are_taken_over_once_and_half_ones_wait(tmp_path: Path) -> None:
    comparison, told = Comparison(grid_table(), tmp_path), []
    results = tmp_path / "work" / "results-0-x.jsonl"
    append_line(results, measured(FEDAVG, 3.0))
    with results.open("a") as file:
        file.write('{"key": "half')
    for _ in range(2):
        comparison._collect(told.append)
    assert len(told) == 1 and len(comparison.store) == 1 and '"half' in results.read_text()
    assert len(Comparison(grid_table(), tmp_path).store) == 1


def test_a_failure_is_taken_over_once_and_a_later_success_replaces_it(tmp_path: Path) -> None:
    comparison, told = Comparison(grid_table(), tmp_path), []
    results = tmp_path / "work" / "results-0-x.jsonl"
    append_line(results, measured(FEDAVG, None))
    comparison._collect(told.append)
    comparison._collect(told.append)
    append_line(results, measured(FEDAVG, 3.0))
    comparison._collect(told.append)
    comparison._collect(told.append)
    assert [found.error for found in told] == ["it broke", None]
    assert comparison.store.get(measured(FEDAVG, 3.0).key) is not None


def test_a_plan_reads_back(tmp_path: Path) -> None:
    table: dict[str, Any] = grid_table()
    plan = Plan(table, tmp_path, tmp_path / "r.jsonl", 2, (("k", measured(FEDAVG, 3.0).cell),))
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


def test_a_strategy_that_can_not_run_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = Comparison(grid_table(strategies=["fedbiot", "fedavg"]), tmp_path)
    inputs = Inputs("m", 6, "rows", "test", "public")
    monkeypatch.setattr(comparison, "_places", Places(comparison.settings, inputs, tmp_path))
    with pytest.raises(ConfigError, match=r"'fedbiot' can't run in this grid: .*the split is 1-1: set it to 0-2"):
        comparison.run()
    assert not list(tmp_path.iterdir())


def test_clients_remember_by_cell_and_public_text() -> None:
    """Another public text makes other keys, so other folders: the same clients may be asked about it."""
    settings = GridSettings.of(grid_table())
    places = [Places(settings, Inputs("m", 6, "rows", "test", public), Path("out")) for public in ("one", "two")]
    found = {each.state(each.key(cell)) for each in places for cell in cells(settings)}
    assert len(found) == 2 * len(cells(settings)) and all(f.parent == Path("out/work/sites") for f in found)


def test_reasons() -> None:
    assert reason(ConfigError("one\ntwo")) == "one two"
    assert reason(ValueError("x" * 400)).startswith("ValueError: xxx") and len(reason(ValueError("x" * 400))) < 320


def test_measured_is_what_the_store_takes() -> None:
    assert Measured.from_dict(measured(FEDAVG, 3.0).to_dict()).key == measured(FEDAVG, 3.0).key
