"""The table of the benchmark of attacks: what is run, what is kept, what is shown; training that is remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.rounds import Dropped, RoundRecord
from offsite_fl.strategies.named import make_strategy
from simulations.attacks import parse_attack
from simulations.benchmarks.attack_world import KEPT, Remembering
from simulations.benchmarks.attacks import ATTACKS, WAYS, Cell, Setup, measure, missing, read, spread, table
from simulations.in_process import task_identity

SETUP = Setup(rounds=1, steps=2, test_tokens=128, attacker=0)


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def test_every_name_in_it_is_known() -> None:
    for attack in ATTACKS[1:]:
        parse_attack(attack)
    for way in WAYS:
        make_strategy(way.base)
    assert len({way.name for way in WAYS}) == len(WAYS) and ATTACKS[0] == ""


def test_what_is_in_the_file_is_not_run_again(tmp_path: Path) -> None:
    cell = Cell(SETUP, 0, "nan", WAYS[0].name, 3.5, attacker_dropped=1)
    path = tmp_path / "cells.jsonl"
    assert list(read(path)) == []
    path.write_text(json.dumps(asdict(cell)) + "\n")
    assert list(read(path)) == [cell]
    everything = [(way, attack) for way in WAYS for attack in ATTACKS]
    assert missing(read(path), SETUP, 0) == [pair for pair in everything if pair != (WAYS[0], "nan")]
    assert missing(read(path), SETUP, 1) == everything
    assert missing(read(path), Setup(2, 2, 128, 0), 0) == everything


def test_means_stars_and_gaps() -> None:
    cells = [
        Cell(SETUP, 0, "", WAYS[0].name, 3.0),
        Cell(SETUP, 1, "", WAYS[0].name, 3.5),
        Cell(SETUP, 0, "nan", WAYS[1].name, 4.0, attacker_dropped=1, others_dropped=2),
        Cell(Setup(9, 9, 9, 0), 0, "", WAYS[0].name, 9.0),
    ]
    lines = table(cells, SETUP).splitlines()
    assert len(lines) == 2 + len(ATTACKS)
    assert lines[2].startswith("| none | 3.250 |  |")
    row = next(line for line in lines if line.startswith("| `nan` |"))
    assert row.startswith("| `nan` |  | 4.000* |")
    assert spread(cells, SETUP) == 0.25


def test_a_round_that_came_to_nothing_is_no_number() -> None:
    class Stub:
        attacker_name = "a"

        def run(self, attack: str, base: str, options: dict[str, float]) -> SimpleNamespace:
            dropped = [Dropped("a", "no file"), Dropped("b", "no file"), Dropped("b", "too late")]
            return SimpleNamespace(history=[RoundRecord(0), RoundRecord(1, dropped=dropped, skipped=skipped)])

        def loss(self, strategy: object) -> float:
            return 3.0

    skipped = True
    with pytest.raises(OffsiteError, match=r"round 1 came to nothing: .*no file"):
        measure(Stub(), SETUP, 0, WAYS[0], "nan")  # type: ignore[arg-type]
    skipped = False
    cell = measure(Stub(), SETUP, 0, WAYS[0], "nan")  # type: ignore[arg-type]
    assert (cell.loss, cell.attacker_dropped, cell.others_dropped) == (3.0, 1, 2)


class Counting:
    """A client app that says how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, message: Message, context: Context) -> Message:
        self.calls += 1
        arrays = ArrayRecord({"w": Array(np.full(1, self.calls, np.float32))})
        return Message(RecordDict({"arrays": arrays, "config": ConfigRecord({})}), reply_to=message)


def ask(app: Remembering, partition: int = 0, server_round: int = 1, value: float = 0.0, kind: str = "train") -> float:
    arrays = ArrayRecord({"w": Array(np.full(1, value, np.float32))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round})})
    context = Context(1, 1, {"partition-id": partition}, RecordDict(), {})
    reply = app(Message(content, 1, kind), context)
    found = float(reply.content["arrays"]["w"].numpy()[0])
    reply.content["arrays"]["w"] = Array(np.zeros(1, np.float32))  # what an attack does to its reply
    return found


def test_training_is_remembered_by_client_round_and_values() -> None:
    app = Remembering(Counting())
    assert [ask(app), ask(app), ask(app)] == [1, 1, 1]
    others = [ask(app, partition=1), ask(app, server_round=2), ask(app, value=0.5), ask(app, kind="train.bundle")]
    assert others == [2, 3, 4, 5] and ask(app) == 1
    assert ask(app, kind="train.bundle") == 6


def test_only_so_much_is_kept_the_latest_used() -> None:
    app = Remembering(Counting())
    first = ask(app)
    for value in range(1, KEPT + 10):
        ask(app, value=float(value))
        assert ask(app) == first
    assert len(app.known) == KEPT and ask(app, value=1.0) > KEPT
