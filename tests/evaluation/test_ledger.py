"""The ledger's sums against sums by hand, and its refusals."""

import json

import pytest

from offsite_fl.errors import DataError
from offsite_fl.evaluation.ledger import Ledger, LedgerEntry


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.add(1, "bundle", "down", "a", 100)
    ledger.add(1, "bundle", "down", "a", 50)  # a second shard
    ledger.add(1, "adapter", "down", "b", 7)
    ledger.add(2, "update", "up", "a", 20)
    ledger.add(2, "metrics", "up", 17, 3)
    return ledger


def test_sums_by_any_keys(ledger: Ledger) -> None:
    assert ledger.total() == 180
    assert ledger.totals() == {(): 180}
    assert ledger.totals("round") == {(1,): 157, (2,): 23}
    assert ledger.totals("direction", "kind") == {
        ("down", "bundle"): 150,
        ("down", "adapter"): 7,
        ("up", "update"): 20,
        ("up", "metrics"): 3,
    }
    assert ledger.totals("node") == {("a",): 170, ("b",): 7, ("17",): 3}


def test_sums_of_what_matches(ledger: Ledger) -> None:
    assert ledger.total(kind="bundle", round=1) == 150
    assert ledger.total(kind="bundle", round=2) == 0
    assert ledger.total(node="a", direction="up") == 20


def test_shards_of_one_bundle_are_one_entry(ledger: Ledger) -> None:
    assert len(ledger) == 4
    assert next(iter(ledger)) == LedgerEntry(1, "bundle", "down", "a", 150)


def test_round_trip_through_json(ledger: Ledger) -> None:
    text = json.dumps(ledger.to_list())
    assert json.loads(text)[0] == {"round": 1, "kind": "bundle", "direction": "down", "node": "a", "bytes": 150}
    again = Ledger.from_list(json.loads(text))
    assert again == ledger and again != Ledger()


def test_a_node_id_of_64_bits_survives() -> None:
    ledger = Ledger()
    ledger.add(1, "update", "up", 2**63 + 1, 1)
    assert Ledger.from_list(ledger.to_list()).totals("node") == {("9223372036854775809",): 1}


GOOD = {"round": 1, "kind": "bundle", "direction": "down", "node": "a", "bytes": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "bundel"}, r"ledger\[1\]: unknown ledger kind 'bundel'; did you mean 'bundle'"),
        ({"direction": "sideways"}, "unknown ledger direction"),
        ({"bytes": -1}, "whole number of at least 0"),
        ({"bytes": 1.5}, "whole number"),
        ({"bytes": True}, "whole number"),
        ({"round": -1}, "ledger round"),
        ({"node": 5}, "ledger node must be a string"),
        ({"byte": 5}, "unknown key 'byte'; did you mean 'bytes'"),
    ],
)
def test_malformed_entries_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Ledger.from_list([GOOD, {**GOOD, **change}])


def test_other_malformed_ledgers() -> None:
    with pytest.raises(DataError, match=r"ledger\[0\] lacks bytes"):
        Ledger.from_list([{k: v for k, v in GOOD.items() if k != "bytes"}])
    with pytest.raises(DataError, match="must be a list"):
        Ledger.from_list({"round": 1})
    with pytest.raises(DataError, match="can't be summed by 'bytes'"):
        Ledger().totals("bytes")


def test_bytes_move_to_a_node_s_own_name() -> None:
    ledger = Ledger()
    ledger.add(1, "metrics", "down", "node-7", 10)
    ledger.add(1, "bundle", "down", "north", 5)
    ledger.add(1, "metrics", "down", "north", 3)
    ledger.rename("node-7", "north")
    ledger.rename("node-8", "south")
    assert ledger.totals("node", "kind") == {("north", "metrics"): 13, ("north", "bundle"): 5}
