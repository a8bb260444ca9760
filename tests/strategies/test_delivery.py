"""The bundle reaches a node once, file by file, and a node that can't get it sits the round out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from offsite_fl.errors import OffsiteError
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.wire import names
from offsite_fl.wire.packs import read_pack
from tests.flower_fakes import Adder, FakeGrid, all_nodes

from .conftest import FIRST, StubBundle, StubOwner, run, sites


class Site(Adder):
    """A client with a disk: keeps the files it is sent, says what is missing, and only then tunes."""

    def __init__(self, **disks: dict[str, bytes]) -> None:
        super().__init__(lambda node, server_round: 1.0)
        self.disks: dict[str, dict[str, bytes]] = disks
        self.before: Callable[[Message, str], Message | None] = lambda message, name: None

    def __call__(self, message: Message, context: Context) -> Message:
        name = context.node_config["name"]
        special = self.before(message, name)
        if special is not None:
            return special
        disk = self.disks.setdefault(name, {})
        if message.metadata.message_type == "train.bundle":
            disk |= dict(read_pack(message.content)[1])
        if message.metadata.message_type in ("train.bundle", "query.bundle"):
            missing = (
                [f for f in StubBundle().contents if f not in disk] if "manifest.json" in disk else ["manifest.json"]
            )
            state: dict[str, Any] = {names.HELD: not missing, names.CLIENT: name, names.MISSING: missing}
            return Message(RecordDict({"config": ConfigRecord(state)}), reply_to=message)
        if disk.keys() != StubBundle().contents.keys():
            return Message(Error(names.BUNDLE_MISSING, "no bundle"), reply_to=message)
        return super().__call__(message, context)


def strategy_for(count: int, pack_bytes: int = 100) -> OffsiteTuning:
    base = FedAvg(fraction_evaluate=0.0, **all_nodes(count))
    strategy = OffsiteTuning(base, StubOwner())  # type: ignore[arg-type]
    strategy.delivery.pack_bytes = pack_bytes
    return strategy


def test_the_bundle_travels_once_and_is_never_asked_for_again() -> None:
    site, strategy = Site(), strategy_for(2)
    grid = FakeGrid(site, sites(2))
    after = run(strategy, grid, 3)
    assert all(disk == StubBundle().contents for disk in site.disks.values())
    assert len(grid.types("query.bundle")) == 2
    # 2 + 90 bytes in a first message, 90 + 2 in a second, to two nodes
    assert len(grid.types("train.bundle")) == 4
    assert torch.equal(after["adapter.1.b"], FIRST["adapter.1.b"] + 3)
    assert strategy.ledger.total(round=1, kind="bundle") > 2 * 184
    assert strategy.ledger.total(round=2, kind="bundle") == 0 == strategy.ledger.total(round=3, kind="bundle")
    assert all(strategy.ledger.total(round=r, kind="adapter", node="a") > 0 for r in (1, 2, 3))
    assert all(strategy.ledger.total(round=r, kind="update", direction="up", node="b") > 0 for r in (1, 2, 3))


def test_the_ledger_counts_what_the_grid_carried() -> None:
    strategy = strategy_for(2)
    grid = FakeGrid(Site(), sites(2))
    run(strategy, grid, 2)
    carried = sum(sent.array_bytes for sent in grid.log)
    booked = strategy.ledger.total(direction="down", kind="bundle") + strategy.ledger.total(
        direction="down", kind="adapter"
    )
    keys = sum(len(k) for k in StubBundle().contents) * 2 + sum(len(k) for k in FIRST) * 4
    assert booked == carried + keys


def test_a_site_that_holds_it_gets_nothing_and_a_part_is_completed() -> None:
    full = dict(StubBundle().contents)
    part = {name: full[name] for name in ("manifest.json", "shards/a")}
    site = Site(a=full, b=part)
    grid = FakeGrid(site, sites(2))
    run(strategy_for(2), grid)
    assert grid.types("train.bundle") == [1007]  # only the second message, only to b
    assert site.disks["b"] == full


def test_a_site_that_fails_sits_the_round_out_and_is_tried_again() -> None:
    site = Site()
    refused = []

    def before(message: Message, name: str) -> Message | None:
        if name == "b" and message.metadata.message_type == "train.bundle" and not refused:
            refused.append(1)
            return Message(Error(names.REFUSED, "BundleError: the disk is full"), reply_to=message)
        return None

    site.before = before
    strategy = strategy_for(2)
    run(strategy, FakeGrid(site, sites(2)), 2)
    (dropped,) = strategy.history[1].dropped
    assert dropped.node == "b" and dropped.reason == "bundle delivery: BundleError: the disk is full"
    assert set(strategy.history[1].clients) == {"a"} and set(strategy.history[2].clients) == {"a", "b"}


def test_an_evicted_bundle_is_delivered_again_in_the_next_round() -> None:
    site, strategy = Site(), strategy_for(2)

    def before(message: Message, name: str) -> Message | None:
        if name == "a" and message.metadata.message_type == "train" and len(strategy.history) == 3:
            site.disks["a"].clear()
        return None

    site.before = before
    grid = FakeGrid(site, sites(2))
    run(strategy, grid, 3)
    assert [d.reason for d in strategy.history[2].dropped] == ["no bundle"]
    assert set(strategy.history[3].clients) == {"a", "b"}
    assert grid.types("query.bundle") == [1000, 1007, 1000] or len(grid.types("query.bundle")) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({}, "bundle.held must be true or false"),
        ({names.HELD: 1}, "bundle.held must be true or false"),
        ({names.HELD: False}, "bundle.missing must be a list"),
        ({names.HELD: False, names.MISSING: []}, "neither has the bundle nor lacks"),
        ({names.HELD: False, names.MISSING: ["other"]}, "other didn't arrive"),
    ],
)
def test_odd_answers_drop_the_site(answer: dict[str, Any], reason: str) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type.endswith(".bundle"):
            return Message(RecordDict({"config": ConfigRecord(answer)}), reply_to=message)
        raise AssertionError("must not be asked to tune")

    strategy = strategy_for(1)
    grid = FakeGrid(client, sites(1))
    run(strategy, grid)
    assert reason in strategy.history[1].dropped[0].reason
    assert not grid.types("train") and strategy.history[1].skipped


def test_silent_sites_and_old_client_apps() -> None:
    def client(message: Message, context: Context) -> Message:
        raise ValueError("No query function registered with name 'bundle'")

    strategy = strategy_for(2)
    run(strategy, FakeGrid(client, sites(2), lambda reply: None if reply.metadata.src_node_id == 1007 else reply))
    reasons = sorted(dropped.reason for dropped in strategy.history[1].dropped)
    assert "bundle query: error 2" in reasons[1] and "No query function" in reasons[1]
    assert reasons[2] == "bundle query: no answer in time"


def test_only_one_message_of_the_bundle_is_in_memory() -> None:
    held: list[int] = []

    class Counting(StubBundle):
        def read_file(self, name: str) -> bytes:
            held.append(len(held))
            return super().read_file(name)

    strategy = OffsiteTuning(FedAvg(**all_nodes(3)), StubOwner(Counting()))  # type: ignore[arg-type]
    strategy.delivery.pack_bytes = 1
    grid = FakeGrid(Site(), sites(3))
    run(strategy, grid)
    assert len(held) == 4  # each file is read once for all three nodes
    assert max(sent.array_bytes for sent in grid.log if sent.type == "train.bundle") < 90 + 200


def test_a_bundle_file_that_changed_on_the_owner_s_disk_is_the_owner_s_error() -> None:
    class Broken(StubBundle):
        def read_file(self, name: str) -> bytes:
            raise OffsiteError(f"{name} has changed")

    strategy = OffsiteTuning(FedAvg(**all_nodes(1)), StubOwner(Broken()))  # type: ignore[arg-type]
    with pytest.raises(OffsiteError, match="has changed"):
        run(strategy, FakeGrid(Site(), sites(1)))
