"""What a message says about its cell reaches the loader, and nothing else is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from offsite_fl.comparing import client_app
from offsite_fl.comparing.cells import Arm, Cell, Condition
from offsite_fl.comparing.federation import cell_config
from offsite_fl.comparing.results import PEAK
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import ConfigError
from offsite_fl.wire import names
from simulations.in_process import task_identity
from tests.comparing.conftest import grid_table


@pytest.fixture(autouse=True)
def _in_a_run() -> Iterator[None]:
    with task_identity():
        yield


def message(**config: str) -> Message:
    return Message(RecordDict({names.CONFIG: ConfigRecord(dict(config))}), 1, "train")


def context(**run_config: str) -> Context:
    return Context(1, 7, {"partition-id": 3, "num-partitions": 4}, RecordDict(), dict(run_config))


def test_the_cell_of_a_message_is_in_the_context_of_that_message_only() -> None:
    seen: list[Context] = []

    def handler(message: Message, context: Context) -> Message:
        seen.append(context)
        return message

    here = context(**{"plan": "p", client_app.CACHE: "cache"})
    for folder in ("one", "two"):
        client_app.with_cell(message(**{client_app.DATA: folder, "tune.lr": "1"}), here, handler)
    client_app.with_cell(message(), here, handler)
    assert [c.run_config.get(client_app.DATA) for c in seen] == ["one", "two", None]
    assert all(c.run_config["plan"] == "p" and "tune.lr" not in c.run_config for c in seen)
    assert all(c.node_config["cache-dir"] == "cache" and c.state is here.state for c in seen)
    assert client_app.DATA not in here.run_config and "cache-dir" not in here.node_config


def test_clients_remember_by_the_cell_and_keep_bundles_for_all() -> None:
    seen: list[Context] = []
    for told in ({client_app.STATE: "one"}, {client_app.STATE: "two"}, {}):
        client_app.with_cell(message(**told), context(**{client_app.CACHE: "cache"}), lambda m, c: seen.append(c) or m)  # type: ignore[func-returns-value]
    assert [c.node_config.get("state-dir") for c in seen] == ["one", "two", None]
    assert {c.node_config["cache-dir"] for c in seen} == {"cache"}


def test_each_client_loads_its_own_file() -> None:
    assert client_app.load_data(context(**{client_app.DATA: "folder"})) == str(Path("folder") / "client-3.jsonl")
    with pytest.raises(ConfigError, match=client_app.DATA):
        client_app.load_data(context())


def test_flipped_labels_are_cut_as_the_cells_own_clients_cut_them(tmp_path: Path) -> None:
    """Block length and loss of the cell's strategy, which may have its own."""
    table = grid_table(attacks=["label-flip"])
    table["tune-for"] = {"fedavg": {"block-size": 24, "loss-on": "answer"}}
    settings = GridSettings.of(table)
    arm = Arm("strategy", "fedavg", "layer-drop:keep=2")
    told = cell_config(settings, Cell(arm, Condition("iid", 2, 1.0, "label-flip"), 0), tmp_path)
    assert (told["compare.block-size"], told["compare.loss-on"]) == (24, "answer")
    other = Cell(Arm("strategy", "fedadam:eta=0.01", arm.emulator), Condition("iid", 2, 1.0, "label-flip"), 0)
    assert cell_config(settings, other, tmp_path)["compare.block-size"] == 128
    # Client 3 of the context is no attacker, so it gets its own file.
    here = context(**{k: v if isinstance(v, int) else str(v) for k, v in told.items()})  # type: ignore[arg-type]
    assert client_app.load_data(here) == str(tmp_path / "client-3.jsonl")


def test_the_peak_is_added_to_a_reply_and_an_error_stays_one() -> None:
    def handler(message: Message, context: Context) -> Message:
        block = bytearray(b"x" * 30_000_000)
        content = RecordDict(
            {"arrays": ArrayRecord(), names.METRICS: MetricRecord({"num-examples": len(block) // 10**7})}
        )
        return Message(content, reply_to=message)

    reply = client_app.with_peak(message(), context(), handler)
    metrics = reply.content.metric_records[names.METRICS]
    if Path("/proc/self/clear_refs").exists():
        assert 20e6 < float(metrics[PEAK]) < 500e6  # type: ignore[arg-type]
    assert metrics["num-examples"] == 3


def test_an_honest_cell_has_no_threat_and_an_attack_needs_its_package() -> None:
    assert client_app.threat_of(context()) is None
    told = {client_app.ATTACK: "sign-flip", client_app.ATTACKERS: "3", client_app.PACKAGE: "no_such_package"}
    with pytest.raises(ConfigError, match="no_such_package"):
        client_app.threat_of(context(**told))
    threat = client_app.threat_of(context(**{**told, client_app.PACKAGE: "simulations.attacks"}))
    assert threat.has(context()) and threat.behaviour.spoils_reply
    answer = client_app.misbehave(message(), context(**told), lambda m, c: m)
    assert answer.has_error() and "no_such_package" in answer.error.reason
