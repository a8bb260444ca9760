"""Each attack does what it says to a message made by hand, for attackers only; and labels that are flipped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.data.examples import to_examples
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ConfigError, DataError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.wire import names
from offsite_fl.wire.codecs import encode
from simulations.attacks import ATTACKS, Threat, flip, parse_attack, with_flipped_labels
from simulations.in_process import task_identity
from tests.conftest import make_pico, make_tokenizer

RECEIVED = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(0.5)}
TRAINED = {"w": torch.tensor([[2.0, 2.0], [3.0, 6.0]]), "b": torch.tensor(-1.5)}  # update: 1, 0, 0, 2 and -2


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def context(partition: int | None = 0) -> Context:
    config: dict[str, Any] = {} if partition is None else {"partition-id": partition, "num-partitions": 5}
    return Context(1, 7, config, RecordDict(), {})


def sent(codec: str = "fp32", server_round: int = 1) -> Message:
    arrays, notes = encode(RECEIVED, RECEIVED, codec)
    config = ConfigRecord({**notes, "server-round": server_round, "tune.seed": 3})
    return Message(RecordDict({"arrays": arrays, "config": config}), 7, "train")


def honest(message: Message, context: Context) -> Message:
    codec = str(message.content["config"]["wire.codec"])
    arrays, notes = encode(TRAINED, RECEIVED, codec)
    metrics = MetricRecord({"num-examples": 11, "train_loss": 2.0})
    config = ConfigRecord({**notes, "client": "x"})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics, "config": config}), reply_to=message)


def values(reply: Message) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in reply.content["arrays"].items()}


def attacked(spec: str, partition: int | None = 0, message: Message | None = None) -> dict[str, np.ndarray]:
    return values(Threat(spec).mod(message or sent(), context(partition), honest))


# Replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "w", "b"),
    [
        ("sign-flip", [[0.0, 2.0], [3.0, 2.0]], 2.5),
        ("scale:factor=3", [[4.0, 2.0], [3.0, 10.0]], -5.5),
        ("scale", [[11.0, 2.0], [3.0, 24.0]], -19.5),
        ("sign-flip+scale:factor=10", [[-9.0, 2.0], [3.0, -16.0]], 20.5),
        ("free-rider", [[1.0, 2.0], [3.0, 4.0]], 0.5),
        ("label-flip", [[2.0, 2.0], [3.0, 6.0]], -1.5),
    ],
)
def test_replies_by_hand(spec: str, w: list[list[float]], b: float) -> None:
    found = attacked(spec)
    assert found["w"].tolist() == w and found["b"].tolist() == b
    assert list(found) == ["w", "b"] and all(value.dtype == np.float32 for value in found.values())


def test_nan_is_everywhere() -> None:
    found = attacked("nan")
    assert np.isnan(found["w"]).all() and found["w"].shape == (2, 2) and math.isnan(found["b"])


def test_a_row_too_many() -> None:
    found = attacked("wrong-shape")
    assert found["w"].tolist() == [[2.0, 2.0], [3.0, 6.0], [0.0, 0.0]] and found["b"].tolist() == [-1.5, 0.0]


def test_noise_is_as_long_as_it_says() -> None:
    """Over many values the noise has std times the RMS of the update, mean zero, and nothing to do with the update."""
    size, std = 200_000, 3.0
    received = {"w": torch.zeros(size)}
    trained = {"w": torch.full((size,), 0.25)}  # RMS 0.25
    noise = parse_attack(f"noise:std={std}").reply(received, trained, torch.Generator().manual_seed(0))["w"] - 0.25
    assert float(noise.std()) == pytest.approx(std * 0.25, rel=0.01)
    assert abs(float(noise.mean())) < 5 * std * 0.25 / math.sqrt(size)
    again = parse_attack("noise").reply(received, received, torch.Generator().manual_seed(0))["w"]
    assert torch.equal(again, received["w"])  # an update of zero has no size to go by


def test_noise_is_the_same_for_the_same_round_and_client_and_no_other() -> None:
    first = attacked("noise")["w"]
    assert np.array_equal(first, attacked("noise")["w"])
    assert not np.array_equal(first, attacked("noise", message=sent(server_round=2))["w"])
    other = values(Threat("noise", (0, 1)).mod(sent(), context(1), honest))["w"]
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("partition", [1, 4, None])
def test_others_are_honest(partition: int | None) -> None:
    found = attacked("nan", partition)
    assert found["w"].tolist() == TRAINED["w"].tolist()


def test_metrics_and_config_stay() -> None:
    reply = Threat("sign-flip").mod(sent(), context(), honest)
    assert dict(reply.content["metrics"]) == {"num-examples": 11, "train_loss": 2.0}
    assert reply.content["config"]["client"] == "x"


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_other_codecs_are_refused(codec: str) -> None:
    reply = Threat("sign-flip").mod(sent(codec), context(), honest)
    assert reply.has_error() and reply.error.code == names.REFUSED
    assert f"'sign-flip' can't be carried out: it works on plain values, the run has codec '{codec}'" in str(
        reply.error.reason
    )
    # whoever only flips labels leaves the reply alone, so any codec will do
    assert Threat("label-flip").mod(sent(codec), context(), honest).has_content()


def test_tensors_that_were_not_sent_are_refused() -> None:
    def fresh(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        reply.content["arrays"] = ArrayRecord({"lora_A": TRAINED["w"]})
        return reply

    reply = Threat("sign-flip").mod(sent(), context(), fresh)
    assert "tensors that weren't in the message, for example 'lora_A'" in str(reply.error.reason)


def test_a_reply_with_fewer_tensors_is_spoiled_in_those() -> None:
    def one_factor(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        del reply.content["arrays"]["w"]
        return reply

    assert {name: v.tolist() for name, v in values(Threat("sign-flip").mod(sent(), context(), one_factor)).items()} == {
        "b": 2.5
    }


def test_error_replies_pass() -> None:
    def fails(message: Message, context: Context) -> Message:
        return Message(Error(3, "no memory"), reply_to=message)

    assert Threat("nan").mod(sent(), context(), fails).error.reason == "no memory"


# Specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("signflip", "unknown attack 'signflip'; did you mean 'sign-flip'"),
        ("scale:factr=2", "unknown setting 'scale:factr'; did you mean 'factor'"),
        ("scale:factor", "'factor' in attack spec 'scale:factor' isn't an option"),
        ("scale:factor=x", "scale:factor = 'x' must be of type float"),
        ("scale:factor=1,factor=2", "'factor' is given twice"),
        ("scale:factor=inf", "scale: factor must be a finite number"),
        ("noise:std=0", "noise: std must be a number above 0"),
        ("sign-flip+", "has an empty part"),
        ("wrong-shape+nan", "wrong-shape must be the last attack"),
    ],
)
def test_specs_that_are_wrong(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Threat(spec)


def test_every_attack_is_described() -> None:
    assert set(ATTACKS) == {"sign-flip", "scale", "noise", "nan", "wrong-shape", "free-rider", "label-flip"}
    assert all(ATTACKS[name].__doc__ for name in ATTACKS)


def test_from_a_run_config() -> None:
    assert Threat.of({"attack": "", "attackers": "0"}) is None and Threat.of({}) is None
    assert Threat.of({"attack": "nan", "attackers": "0, 3", "seed": 1}) == Threat("nan", (0, 3))
    assert Threat.of({"attack": "nan", "attackers": 2}) == Threat("nan", (2,))
    with pytest.raises(ConfigError, match="attackers = 'x' must be of type int"):
        Threat.of({"attack": "nan", "attackers": "x"})
    with pytest.raises(ConfigError, match="partition ids from 0"):
        Threat("nan", (-1,))


# Labels ------------------------------------------------------------------------------------------------------------


def test_labels_by_hand() -> None:
    examples = Dataset.from_dict({"input_ids": [[0, 1, 2], [9, 5]], "labels": [[0, 1, 2], [-100, 5]]})
    flipped = flip(examples, 10)
    assert flipped["labels"][:] == [[9, 8, 7], [-100, 4]] and flipped["input_ids"][:] == examples["input_ids"][:]
    assert flip(flipped, 10)["labels"][:] == examples["labels"][:]
    with pytest.raises(DataError, match="outside of the 5 tokens"):
        flip(examples, 5)


def test_only_attackers_learn_from_flipped_labels(tmp_path: Path) -> None:
    tokenizer, path = make_tokenizer(), tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "rain falls on the hills. " * 9}))
    load = with_flipped_labels(lambda context: str(path), {1}, lambda context: tokenizer, 8)
    assert load(context(0)) == str(path)
    found = load(context(1))
    plain = to_examples(path, tokenizer, block_size=8)
    assert isinstance(found, Dataset) and found["input_ids"][:] == plain["input_ids"][:]
    assert np.array_equal(np.array(found["labels"]), len(tokenizer) - 1 - np.array(plain["labels"]))
    # what it is given as examples the client takes as they are
    assert to_examples(found, tokenizer, block_size=8) is found


def test_validation_data_stay(tmp_path: Path) -> None:
    tokenizer, path = make_tokenizer(), tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "rain falls on the hills. " * 9}))
    found = with_flipped_labels(lambda context: (str(path), str(path)), {0}, lambda context: tokenizer, 8)(context(0))
    assert isinstance(found, tuple) and isinstance(found[0], Dataset) and found[1] == str(path)


def test_training_on_flipped_labels_makes_flipped_tokens_likely(tmp_path: Path) -> None:
    """Loss on the true tokens grows, and loss on the flipped ones shrinks."""
    tokenizer = make_tokenizer()
    owner = ModelOwner(make_pico("llama"), tokenizer, Split(first=1, last=1))
    data_owner = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"))
    data = Dataset.from_dict({"text": ["rain falls on the hills. " * 30]})
    plain = to_examples(data, tokenizer, block_size=8)
    flipped = flip(plain, len(tokenizer))
    tune = TuneConfig(max_steps=30, lr=3e-3, block_size=8, progress=False, device="cpu")
    before = [data_owner.evaluate(examples, tune).loss for examples in (plain, flipped)]
    data_owner.tune(flipped, tune)
    after = [data_owner.evaluate(examples, tune).loss for examples in (plain, flipped)]
    assert after[0] > before[0] and after[1] < before[1]


# The client app ----------------------------------------------------------------------------------------------------


def test_inside_a_client_app_only_tuning_is_attacked(tmp_path: Path) -> None:
    """Bundle queries go past the mod: an attacker still takes part."""
    app = make_client_app(lambda context: "none", train_mods=[Threat("nan").mod], cache=tmp_path)
    query = Message(RecordDict({"config": ConfigRecord({"bundle.digest": "d" * 64})}), 7, "query.bundle")
    reply = app(query, context())
    assert reply.has_content() and reply.content["config"]["bundle.held"] is False
