"""FedBiOT with pico clients: aligned before each broadcast, patched on every site, healed, resumed bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr.app import Array, ArrayRecord, Context, Message

from offsite_fl.alignment import Aligner
from offsite_fl.client_app import make_client_app
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import OffsiteError
from offsite_fl.local.open_network import networks
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.wire import names
from tests.flower_fakes import FakeGrid
from tests.pico_clients import (
    own_process,  # noqa: F401  (fixtures)
    reasons,
)

from .fedbiot_sites import PUBLIC, TUNE, fedbiot, last_block_owner, sites, strategy_for  # noqa: F401  (fixtures)


def patch_files(node: dict[str, Any]) -> list[Path]:
    return sorted(Path(node["cache-dir"]).glob("patches/*/*/*.safetensors"))


class Recorded:
    """A client app whose replies' patch digests are kept, in order of arrival."""

    def __init__(self) -> None:
        self.app, self.said = make_client_app(), []  # type: ignore[var-annotated]

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        if message.metadata.message_type == "train" and reply.has_content():
            self.said.append(next(iter(reply.content.config_records.values())).get(names.PATCH))
        return reply


# A round ------------------------------------------------------------------------------------------------------------


def test_the_clients_emulator_is_the_servers_after_every_round(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 13: refreshed emulators never left the server."""
    client, seen = Recorded(), []
    strategy = strategy_for(owner)
    strategy.start(FakeGrid(client, nodes), num_rounds=2, evaluate_fn=lambda r, a: seen.append(strategy.patch) or None)
    assert not reasons(strategy)
    assert seen[0] is None
    digests = [patch.digest for patch in seen[1:]]
    assert client.said == [digests[0]] * 2 + [digests[1]] * 2 and digests[0] != digests[1]
    for node in nodes.values():
        assert {path.stem for path in patch_files(node)} == set(digests)


def test_no_more_than_two_patches_stay_on_a_site(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    strategy = strategy_for(owner, min_results=2)
    strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=3)
    assert [len(patch_files(node)) for node in nodes.values()] == [2, 2]
    assert all(strategy.patch.digest in {p.stem for p in patch_files(node)} for node in nodes.values())  # type: ignore[union-attr]


def test_bytes_of_patches_are_counted_apart(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    strategy = strategy_for(owner)
    strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=2)
    values = sum(t.numel() * 4 for t in strategy.patch.tensors.values())  # type: ignore[union-attr]
    for server_round in (1, 2):
        sent = strategy.ledger.total(round=server_round, kind="patch", direction="down")
        assert 2 * values < sent < 2 * values + 2 * 300 * (len(strategy.patch.tensors) + 1)  # type: ignore[union-attr]
    assert strategy.ledger.total(round=2, kind="bundle") == 0


def test_alignment_lowers_the_hidden_error_that_clients_see(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    strategy = strategy_for(owner, fedbiot(first_steps=40))
    result = strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["alignment_last_loss"] < 0.8 * metrics["alignment_first_loss"]


def test_one_round_is_the_clients_own_tuning_on_the_patched_emulator(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """What a site does by the round's message equals what it does by hand: patch, proximal term, LoRA."""
    from offsite_fl.wire.settings import client_seed

    only = {500: nodes[500]}
    base = fedbiot(epsilon=3.0, min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
    strategy = strategy_for(owner, base)
    start = {name: t.clone() for name, t in strategy.state.items()}
    strategy.start(FakeGrid(make_client_app(), only), num_rounds=1)
    alone = DataOwner.open(owner.bundle)  # type: ignore[arg-type]
    alone.patch(strategy.patch)
    tune = replace(TUNE, proximal_mu=6.0, seed=client_seed(TUNE.seed, 1, "a"))
    expected = alone.tune(nodes[500]["data"], tune, start=start)
    assert all(torch.equal(strategy.state[name], expected.tensors[name]) for name in start)
    alone.patch(None)
    bare = alone.tune(nodes[500]["data"], tune, start=start)
    assert any(not torch.equal(strategy.state[name], bare.tensors[name]) for name in start)


def test_epsilon_reaches_the_clients_without_a_half(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 12: the proximal term of the public code has no gradient. epsilon ||.||^2 is mu / 2 ||.||^2."""
    sent: list[Any] = []
    app = make_client_app()

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            sent.append(next(iter(message.content.config_records.values()))["tune.proximal-mu"])
        return app(message, context)

    moved = {}
    for epsilon in (0.0, 20.0):
        strategy = strategy_for(owner, fedbiot(epsilon=epsilon, realign=-1))
        before = owner.adapter_values(strategy.state, strategy.lora)
        strategy.start(FakeGrid(client, nodes), num_rounds=2)
        after = owner.adapter_values(strategy.state, strategy.lora)
        moved[epsilon] = sum(float((after[n] - before[n]).square().sum()) for n in after)
    assert sent == [0.0] * 4 + [40.0] * 4
    assert 0 < moved[20.0] < moved[0.0]


# Faults and healing -------------------------------------------------------------------------------------------------


def test_a_damaged_patch_is_found_and_sent_again(
    owner: ModelOwner, nodes: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The site's file is changed after it was confirmed: the site says so, sits this out, and gets the patch whole."""
    app, tampered = make_client_app(), []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_id == 500 and not tampered:
            (path,) = patch_files(nodes[500])
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(bytes(data))
            tampered.append(path)
        return app(message, context)

    grid = FakeGrid(client, nodes)
    strategy = strategy_for(owner, fedbiot(realign=0))
    with caplog.at_level(logging.WARNING):
        strategy.start(grid, num_rounds=2)
    assert len(reasons(strategy)) == 1 and "PatchMissing" in reasons(strategy)[0]
    assert set(strategy.history[1].clients) == {"b"} and set(strategy.history[2].clients) == {"a", "b"}
    assert grid.types("train.patch") == [500, 501, 500]


def test_a_reply_from_another_emulator_is_dropped_with_the_reason(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    def tamper(reply: Message) -> Message:
        if reply.has_content() and reply.metadata.message_type == "train" and reply.metadata.src_node_id == 501:
            config = next(iter(reply.content.config_records.values()))
            if names.EVALUATES in config:
                config[names.PATCH] = "0" * 64
        return reply

    grid = FakeGrid(make_client_app(), nodes, tamper)
    strategy = strategy_for(owner, fedbiot(realign=0))
    strategy.start(grid, num_rounds=2)
    assert [set(record.clients) for record in strategy.history[1:]] == [{"a"}, {"a"}]
    assert all(
        reason.startswith("its emulator had patch 000000000000, the server's has") for reason in reasons(strategy)
    )
    assert grid.types("train.patch") == [500, 501, 501]  # resent, since the node's emulator wasn't the server's


def test_a_site_with_public_examples_is_refused(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 15: the alignment ran on the clients' own data."""
    Path(nodes[501]["data"]).write_text("\n".join(json.dumps({"text": text}) for text in PUBLIC["text"]))
    strategy = strategy_for(owner)
    strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=1)
    (reason,) = reasons(strategy)
    assert "PublicOverlap: some of this site's examples are in the public text" in reason
    assert set(strategy.history[1].clients) == {"a"}


def test_other_public_text_is_for_another_state_dir(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """A site answers one question for good; a simulation's operator gives each run a folder, and bundles stay."""
    other = Dataset.from_dict({"text": ["another public text than the one before. " * 4]})

    def run_in(state: str, public: Dataset) -> OffsiteTuning:
        own = {node: {**config, "state-dir": str(Path(config["cache-dir"]) / state)} for node, config in nodes.items()}
        strategy = strategy_for(owner, public=public)
        strategy.start(FakeGrid(make_client_app(), own), num_rounds=1)
        return strategy

    first, second, third = run_in("one", PUBLIC), run_in("two", other), run_in("one", other)
    assert not reasons(first) and not reasons(second)
    assert sum("OtherPublicText" in reason for reason in reasons(third)) == 2 and third.history[1].skipped
    assert first.ledger.total(kind="bundle") > 0 == second.ledger.total(kind="bundle")
    root = Path(nodes[500]["cache-dir"])
    assert not list(root.glob("public/*")) and not list(root.glob("patches/*"))
    assert {path.parts[-4] for path in root.glob("*/patches/*/*")} == {"one", "two"}


def test_each_message_in_a_process_of_its_own(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 14: the client of the public code can't run distributed. As deployed, each message finds a new process."""
    app = make_client_app()

    def forgetful(message: Message, context: Context) -> Message:
        networks.clear()
        return app(message, context)

    states = []
    for client in (forgetful, make_client_app()):
        strategy = strategy_for(owner, fedbiot(epsilon=2.0))
        strategy.start(FakeGrid(client, nodes), num_rounds=2)
        assert not reasons(strategy)
        states.append(strategy.state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_after_plug_in_exactly_the_adapter_differs(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 1: names that fit nowhere were ignored, and what was measured as plug-in was the raw model."""
    before = {name: tensor.clone() for name, tensor in owner.model.state_dict().items()}
    strategy = strategy_for(owner)
    strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=1)
    update = strategy.update()
    with owner.plugged_in(update.tensors, update.lora) as full:
        changed = {name for name, tensor in full.state_dict().items() if not torch.equal(tensor, before[name])}
    last = owner.blocks.depth - 1
    targets = {f"{owner.blocks.path}.{last}.{slot.split('.', 2)[2]}" for slot in owner.lora_targets(update.lora)}  # type: ignore[arg-type]
    assert changed == targets and len(targets) == 7
    # As their keys are, relative to the list of blocks.
    foreign = {name.partition(".")[2]: value for name, value in owner.adapter().items()}
    with pytest.raises(OffsiteError, match="input_layernorm"), owner.plugged_in(foreign):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in owner.model.state_dict().items())


def test_who_sat_out_gets_the_patch_of_now(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 21: one of two sites a round; whoever comes back is on the server's emulator and not on an old one."""
    random.seed(3)
    client, seen = Recorded(), []
    some = {"fraction_train": 0.5, "min_train_nodes": 1}
    strategy = strategy_for(owner, fedbiot(**some))
    strategy.start(FakeGrid(client, nodes), num_rounds=5, evaluate_fn=lambda r, a: seen.append(strategy.patch) or None)
    taking_part = [next(iter(entry.clients)) for entry in strategy.history[1:]]
    assert set(taking_part) == {"a", "b"} and any(one != two for one, two in itertools.pairwise(taking_part))
    assert not reasons(strategy) and client.said == [patch.digest for patch in seen[1:]] and len(set(client.said)) == 5


def test_a_round_that_nobody_answers_leaves_the_run_going(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Fault 21: partial participation and failures."""
    app, rounds = make_client_app(), []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            number = next(iter(message.content.config_records.values()))["server-round"]
            rounds.append(number)
            if number == 1 or context.node_id == 500:
                raise RuntimeError("out of memory")
        return app(message, context)

    strategy = strategy_for(owner)
    before = {name: t.clone() for name, t in strategy.state.items()}
    strategy.start(FakeGrid(client, nodes), num_rounds=2)
    assert strategy.history[1].skipped and set(strategy.history[2].clients) == {"b"}
    assert any(not torch.equal(strategy.state[name], before[name]) for name in before)


def test_a_node_that_cannot_take_the_patch_sits_the_round_out(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    app = make_client_app()

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == names.TRAIN_PATCH and context.node_id == 500:
            raise OSError("disk full")
        return app(message, context)

    grid = FakeGrid(client, nodes)
    strategy = strategy_for(owner)
    strategy.start(grid, num_rounds=1)
    (reason,) = reasons(strategy)
    assert reason.startswith("patch delivery: ") and grid.types("train") == [501]


def test_a_huge_reply_costs_its_round_and_no_more(owner: ModelOwner, nodes: dict[int, Any], tmp_path: Path) -> None:
    """Finite values that pass screening and give the emulator no finite loss. The run goes on, also when resumed."""
    tune, rounds = replace(TUNE, lora_rank=0), []

    def tamper(reply: Message) -> Message:
        arrays = reply.content.array_records.get(names.ARRAYS) if reply.has_content() else None
        if reply.metadata.src_node_id == 501 and arrays:
            rounds.append(1)
            if len(rounds) == 2:
                huge = {name: Array(array.numpy() * np.float32(1e25)) for name, array in arrays.items()}
                reply.content[names.ARRAYS] = ArrayRecord(huge)
        return reply

    def run(last: int, **options: Any) -> OffsiteTuning:
        strategy = strategy_for(owner, tune=tune, run_dir=tmp_path / "run", **options)
        strategy.start(FakeGrid(make_client_app(), nodes, tamper), num_rounds=last)
        return strategy

    after_1 = {name: t.clone() for name, t in run(1).state.items()}
    strategy = run(2, resume=True)
    assert [record.skipped for record in strategy.history] == [False, False, True]
    (reason,) = reasons(strategy)
    assert "the emulator's loss on public text is nan with it" in reason
    assert all(torch.equal(strategy.state[name], after_1[name]) for name in after_1)
    resumed = run(4, resume=True)
    assert [record.skipped for record in resumed.history] == [False, False, True, False, False]
    assert any(not torch.equal(resumed.state[name], after_1[name]) for name in after_1)


def test_an_alignment_that_diverges_keeps_the_patch_from_before(
    owner: ModelOwner, nodes: dict[int, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, seen = Aligner.loss, []

    def loss(self: Aligner, *args: Any) -> torch.Tensor:
        found = real(self, *args)
        return found * math.nan if self.step == 4 and torch.is_grad_enabled() and not seen[2:] else found

    monkeypatch.setattr(Aligner, "loss", loss)  # in the second step before round 2
    strategy = strategy_for(owner)
    with caplog.at_level(logging.WARNING):
        strategy.start(
            FakeGrid(make_client_app(), nodes), num_rounds=3, evaluate_fn=lambda r, a: seen.append(strategy.patch)
        )
    digests = [patch.digest for patch in seen[1:]]
    assert digests[0] == digests[1] != digests[2]
    (left,) = [(r.round, d.node, d.reason) for r in strategy.history for d in r.dropped]
    assert left[:2] == (2, "alignment") and left[2].startswith("the emulator keeps its patch from before: loss is nan")
    assert left[2] in caplog.text
    assert [set(record.clients) for record in strategy.history[1:]] == [{"a", "b"}] * 3
    assert not any(record.skipped for record in strategy.history)


def test_options_that_diverge_at_once_are_an_error(owner: ModelOwner, nodes: dict[int, Any]) -> None:
    """Before round 1 no site has replied yet, and there is no patch to keep."""
    strategy = strategy_for(owner, fedbiot(align_lr=1e30))
    with pytest.raises(OffsiteError, match="of the alignment; lower its lr"):
        strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=1)


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_resumed_alignment_equals_an_uninterrupted_one(
    owner: ModelOwner, nodes: dict[int, Any], tmp_path: Path
) -> None:
    """Fault 21: factors, optimiser, batches and step count go on where they were, bit for bit."""

    def run(folder: str, rounds: int, **options: Any) -> OffsiteTuning:
        networks.clear()
        strategy = strategy_for(owner, run_dir=tmp_path / folder, **options)
        strategy.start(FakeGrid(make_client_app(), nodes), num_rounds=rounds)
        return strategy

    whole = run("whole", 3)
    run("parts", 2)
    torch.manual_seed(99), np.random.seed(99)
    second = run("parts", 3, resume=True)
    assert not reasons(second)
    assert second.patch is not None and whole.patch is not None and second.patch.digest == whole.patch.digest
    assert all(torch.equal(second.state[name], whole.state[name]) for name in whole.state)
    assert second.patching.source.aligner.step == 3 + 2 + 2  # type: ignore[union-attr]


def test_another_public_text_can_t_go_on(owner: ModelOwner, nodes: dict[int, Any], tmp_path: Path) -> None:
    strategy_for(owner, run_dir=tmp_path / "run").start(FakeGrid(make_client_app(), nodes), num_rounds=1)
    other = Dataset.from_dict({"text": ["another text of more than twelve letters"]})
    resumed = strategy_for(owner, run_dir=tmp_path / "run", resume=True, public=other)
    with pytest.raises(Exception, match=r"base\.public_digest was"):
        resumed.start(FakeGrid(make_client_app(), nodes), num_rounds=2)
