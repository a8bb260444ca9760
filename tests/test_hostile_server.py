"""What a server that sends what it likes gets out of a site: no text by way of public examples, and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from offsite_fl.client_app import make_client_app
from offsite_fl.config import LoraOptions, TuneConfig
from offsite_fl.data.fingerprints import fingerprints
from offsite_fl.data_owner import network_of
from offsite_fl.owner import ModelOwner
from offsite_fl.patch import Patch
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.tuning.emulator_lora import EmulatorLora
from offsite_fl.wire import names
from offsite_fl.wire.codecs import encode
from offsite_fl.wire.patches import make_patch
from offsite_fl.wire.settings import tune_to_config
from tests.conftest import VOCAB
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_clients import one_owner, own_process, two_sites  # noqa: F401  (fixtures)

TUNE = TuneConfig(max_steps=1, lr=1e-2, batch_size=1, block_size=12, progress=False, device="cpu", optimizer="sgd")
TEXT = "rain falls on the hills. "  # what the site a holds, eight times


class Hostile:
    """A server that writes its messages by hand, to one site that has the bundle."""

    def __init__(self, owner: ModelOwner, node: dict[str, Any]) -> None:
        self.owner, self.grid = owner, FakeGrid(make_client_app(), {500: node})
        strategy = OffsiteTuning(FedAvg(**all_nodes(1)), owner, tune=TUNE)
        assert not strategy.delivery.ensure(self.grid, 0, [500])
        self.digest = owner.bundle.digest  # type: ignore[union-attr]
        bare = EmulatorLora(network_of(owner.bundle), owner.bundle.plan, LoraOptions(1))  # type: ignore[arg-type, union-attr]
        self.patch = Patch(bare.tensors(), self.digest, LoraOptions(1))

    def send(self, kind: str, content: RecordDict) -> str:
        """What the site says: "" to what it does, else its reason."""
        (reply,) = self.grid.send_and_receive([Message(content, 500, kind)])
        return str(reply.error.reason) if reply.has_error() else ""

    def train(
        self, arrays: ArrayRecord | None = None, tune: TuneConfig = TUNE, config: Mapping[str, Any] | None = None
    ) -> str:
        state = encode(self.owner.initial_state(), self.owner.initial_state())[0] if arrays is None else arrays
        settings = {names.DIGEST: self.digest, "server-round": 1, **tune_to_config(tune), **(config or {})}
        return self.send("train", RecordDict({"arrays": state, "config": ConfigRecord(settings)}))

    def asks(self, guesses: Iterable[tuple[int, ...]], block_size: int) -> str:
        """Whether the site holds one of the ``guesses`` among its examples of ``block_size`` tokens."""
        public = fingerprints(Dataset.from_dict({"input_ids": [list(guess) for guess in guesses]}))
        assert not self.send(names.TRAIN_PATCH, make_patch(self.patch, public))
        return self.train(tune=replace(TUNE, block_size=block_size), config={names.PATCH: self.patch.digest})


def searched(guesses: list[tuple[int, ...]], holds: Callable[[list[tuple[int, ...]]], bool]) -> tuple[int, ...]:
    """The guess that is right, by halves."""
    while len(guesses) > 1:
        half = guesses[: len(guesses) // 2]
        guesses = half if holds(half) else guesses[len(half) :]
    return guesses[0]


# Public examples ----------------------------------------------------------------------------------------------------


def test_the_prefix_can_t_be_searched_token_by_token(owner: ModelOwner, tmp_path: Path) -> None:
    """The server knows how the text begins, grows the blocks by one token, and asks for half of the continuations."""
    server = Hostile(owner, two_sites(tmp_path)[500])
    secret = tuple(owner.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    answers: list[str] = []

    def holds(guesses: list[tuple[int, ...]]) -> bool:
        answers.append(server.asks(guesses, len(guesses[0])))
        return "PublicOverlap" in answers[-1]

    found = secret[:3]
    while len(found) < 8:
        found = searched([(*found, token) for token in range(VOCAB)], holds)
    assert found[3:] != secret[3:8]
    assert len(answers) == 5 * 6 and all("OtherPublicText" in answer for answer in answers[1:])


def test_after_one_answer_right_and_wrong_guesses_get_the_same_one(owner: ModelOwner, tmp_path: Path) -> None:
    node = two_sites(tmp_path)[500]
    server = Hostile(owner, node)
    right = [tuple(owner.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:12])]
    wrong = [tuple(range(4, 16))]
    assert server.asks(wrong, 12) == server.asks(wrong, 12) == ""  # the same question, the same answer
    assert server.asks(right, 12) == server.asks([*wrong, *wrong, (4, 5)], 12) != ""
    assert "OtherPublicText" in server.asks(right, 12) and str(tmp_path) not in server.asks(right, 12)
    again = Hostile(owner, node)  # another process, another run
    assert again.asks(right, 12) == server.asks(right, 12)
    assert again.asks([], 12) == "" and again.train() == ""  # what asks nothing isn't refused


def test_no_message_moves_what_a_site_remembers(owner: ModelOwner, tmp_path: Path) -> None:
    """Where that lies is the operator's to say: a message with the same keys gets no second answer."""
    server = Hostile(owner, two_sites(tmp_path)[500])
    assert server.asks([(4, 5)], 2) == ""
    told = {"state-dir": str(tmp_path / "else"), "cache-dir": str(tmp_path / "else"), names.PATCH: server.patch.digest}
    elsewhere = server.train(tune=replace(TUNE, block_size=3), config=told)
    assert "OtherPublicText" in elsewhere and not (tmp_path / "else").exists()


def test_a_site_that_is_called_by_its_node_s_number_stays_the_same_site(owner: ModelOwner, tmp_path: Path) -> None:
    node = {key: value for key, value in two_sites(tmp_path)[500].items() if key != "name"}
    server = Hostile(owner, node)
    assert server.asks([(4, 5)], 2) == ""
    server.grid.contexts[500] = Context(1, 777, node, RecordDict(), {})
    assert "OtherPublicText" in server.asks([(5, 4)], 2)


# What stays behind --------------------------------------------------------------------------------------------------


def test_factors_of_nan_to_evaluate_leave_nothing_in_the_network_of_the_next_message(
    owner: ModelOwner, tmp_path: Path
) -> None:
    server = Hostile(owner, two_sites(tmp_path)[500])
    tune = replace(TUNE, lora_rank=1, validation_share=0.5)
    factors = {name: torch.full_like(value, torch.nan) for name, value in owner.initial_state(tune.lora).items()}
    settings = {names.DIGEST: server.digest, "server-round": 1, **tune_to_config(tune)}
    content = RecordDict({"arrays": encode(factors, factors)[0], "config": ConfigRecord(settings)})
    assert "values that aren't finite" in server.send("evaluate", content)
    assert server.train() == ""


# Memory -------------------------------------------------------------------------------------------------------------

HUGE = 2**40


def test_a_rank_that_nothing_backs_makes_no_factor(owner: ModelOwner, tmp_path: Path) -> None:
    server = Hostile(owner, two_sites(tmp_path)[500])
    lora = replace(TUNE, lora_rank=HUGE)
    small = {name: Array(np.zeros((1, 1), np.float32)) for name in owner.initial_state(LoraOptions(1))}
    assert f"has shape (1, 1), expected ({HUGE}, 32)" in server.train(ArrayRecord(small), lora)
    assert f"lora-rank = {HUGE} is more than" in server.train(ArrayRecord({"x": Array(np.zeros(1))}), lora)
    assert f"lora-rank = {HUGE} is more than" in server.train(tune=replace(lora, lora_fresh=True))
    personal = {
        names.ALGORITHM: "fedper",
        "local.option.personal": "0,1",
        names.RUN_KEY: "0" * 32,
        names.STATE_ROUND: 0,
    }
    reason = server.train(ArrayRecord({}), lora, personal)
    assert f"lora-rank = {HUGE} is more than" in reason


def test_fresh_factors_have_at_most_the_rank_of_a_linear(owner: ModelOwner, tmp_path: Path) -> None:
    """The pico model's linears are 32 x 32, 32 x 16, 64 x 32 and 32 x 64."""
    server = Hostile(owner, two_sites(tmp_path)[500])
    assert server.train(tune=replace(TUNE, lora_rank=32, lora_fresh=True)) == ""
    assert "set it to 32 or less" in server.train(tune=replace(TUNE, lora_rank=33, lora_fresh=True))


def test_a_patch_of_a_rank_that_nothing_backs(owner: ModelOwner, tmp_path: Path) -> None:
    server = Hostile(owner, two_sites(tmp_path)[500])
    none = np.empty(0, np.uint64)
    small = {name: torch.zeros(1, 1) for name in server.patch.tensors}
    lying = Patch(small, server.digest, LoraOptions(HUGE))
    assert f"has rank 1, the patch's options say {HUGE}" in server.send(names.TRAIN_PATCH, make_patch(lying, none))
    empty = Patch({}, server.digest, LoraOptions(HUGE))
    assert server.send(names.TRAIN_PATCH, make_patch(empty, none)) == ""
    assert "missing LoRA factor" in server.train(config={names.PATCH: empty.digest})
