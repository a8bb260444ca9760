"""The quickstart's keys for attacks: nothing where they are empty, the repository's attacks where one is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from offsite_fl.data.examples import to_examples
from offsite_fl.errors import ConfigError
from simulations.in_process import task_identity
from tests.conftest import make_pico, make_tokenizer

APP = Path(__file__).parents[2] / "simulations" / "quickstart"
HONEST = {"codec": "fp32", "attack": "", "attackers": "0"}


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The app's module, imported as Flower does: with the app's own folder on the path."""
    monkeypatch.syspath_prepend(str(APP))
    import quickstart.attack as module

    with task_identity():
        yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        del sys.modules[name]


def context(run_config: dict[str, Any], partition: int = 0) -> Context:
    return Context(1, 7, {"partition-id": partition, "num-partitions": 2}, RecordDict(), HONEST | run_config)


def sent() -> Message:
    config = ConfigRecord({"wire.codec": "fp32", "server-round": 1})
    return Message(RecordDict({"arrays": ArrayRecord([np.ones(2, np.float32)]), "config": config}), 7, "train")


def honest(message: Message, context: Context) -> Message:
    arrays = ArrayRecord([np.full(2, 3, np.float32)])
    return Message(RecordDict({"arrays": arrays, "config": ConfigRecord({})}), reply_to=message)


def reply(attack: ModuleType, run_config: dict[str, Any], partition: int = 0) -> list[float]:
    found = attack.misbehave(sent(), context(run_config, partition), honest)
    return next(iter(found.content["arrays"].values())).numpy().tolist()


def test_an_honest_run(attack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simulations.attacks", None)  # nothing of it is needed
    assert reply(attack, {}) == [3.0, 3.0]
    assert attack.or_flipped(lambda context: "a file")(context({})) == "a file"
    assert attack.threat_of(HONEST | {"codec": "int8"}) is None


def test_attackers_by_partition(attack: ModuleType) -> None:
    asked = {"attack": "sign-flip", "attackers": "1"}
    assert reply(attack, asked, 1) == [-1.0, -1.0] and reply(attack, asked, 0) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("run_config", "words"),
    [
        ({"attack": "signflip"}, "unknown attack 'signflip'"),
        ({"attack": "nan", "codec": "int8"}, "set codec to fp32, not 'int8'"),
    ],
)
def test_what_can_not_be_is_said_by_server_and_client(
    attack: ModuleType, run_config: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        attack.threat_of(HONEST | run_config)
    answer = attack.misbehave(sent(), context(run_config), honest)
    assert answer.has_error() and words in str(answer.error.reason)


def test_without_the_repository(attack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simulations.attacks", None)
    with pytest.raises(ConfigError, match=r"in its root with PYTHONPATH=\."):
        attack.threat_of(HONEST | {"attack": "nan"})


def test_flipped_labels_are_those_of_the_runs_tokenizer(attack: ModuleType, tmp_path: Path) -> None:
    tokenizer, path = make_tokenizer(), tmp_path / "data.jsonl"
    make_pico("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path.write_text(json.dumps({"text": "rain falls on the hills. " * 9}))
    asked = {"attack": "label-flip", "model": str(tmp_path / "model"), "tune.block-size": 8, "tune.loss-on": "all"}
    load = attack.or_flipped(lambda context: str(path))
    assert load(context(asked, 1)) == str(path)
    found, plain = load(context(asked, 0)), to_examples(path, tokenizer, block_size=8)
    assert isinstance(found, Dataset)
    assert np.array_equal(np.array(found["labels"]), len(tokenizer) - 1 - np.array(plain["labels"]))
    assert load(context(asked | {"attack": "nan"}, 0)) == str(path)  # no label is flipped
