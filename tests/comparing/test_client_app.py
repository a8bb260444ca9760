"""What a message says about its cell reaches the loader, and nothing else is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from offsite_fl.comparing import client_app
from offsite_fl.comparing.results import PEAK
from offsite_fl.errors import ConfigError
from offsite_fl.wire import names
from simulations.in_process import task_identity


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


def test_each_client_loads_its_own_file() -> None:
    assert client_app.load_data(context(**{client_app.DATA: "folder"})) == str(Path("folder") / "client-3.jsonl")
    with pytest.raises(ConfigError, match=client_app.DATA):
        client_app.load_data(context())


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
