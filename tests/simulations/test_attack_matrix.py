"""One malicious client among honest ones whose updates are known: what each strategy makes of each attack.

Coordinate-wise median, trimmed mean and Bulyan lie within the range of the honest values in every coordinate, whatever
one client sends (Yin et al. 2018, arXiv 1803.01498; El Mhamdi et al. 2018, arXiv 1802.07927), and so do Krum and
MultiKrum (Blanchard et al. 2017, arXiv 1703.02757) as long as what it sends is far from the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.named import make_strategy
from offsite_fl.wire.codecs import decode, encode
from simulations.attacks import ATTACKS, Threat
from tests.flower_fakes import Adder, FakeGrid, all_nodes
from tests.strategies.conftest import FIRST, identity, run, short_collections, wrap

__all__ = ["identity", "short_collections"]  # fixtures that every test here takes

VALUES = 5
CLIP = 2.5
# name: base, options of the wrapper, how many clients. Bulyan needs 4 * 1 + 3 replies even where one is dropped.
PLAIN = ("fedavg", {}, 5)
ROBUST: dict[str, tuple[str, dict[str, Any], int]] = {
    "median": ("fedmedian", {}, 5),
    "trimmed mean": ("fedtrimmedavg:beta=0.25", {}, 5),
    "krum": ("krum:num-malicious-nodes=1", {}, 5),
    "multikrum": ("multikrum:num-malicious-nodes=1,num-nodes-to-select=3", {}, 5),
    "bulyan": ("bulyan:num-malicious-nodes=1", {}, 8),
}
# With what they keep out.
SCREENED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "norm ratio": ({"max_norm_ratio": 3.0}, {"scale:factor=10", "sign-flip+scale:factor=10", "noise:std=10"}),
    "cosine": ({"min_cosine": 0.5}, {"sign-flip", "sign-flip+scale:factor=10", "noise:std=10", "free-rider"}),
}
WELL_FORMED = ["sign-flip", "scale:factor=10", "sign-flip+scale:factor=10", "noise:std=10", "free-rider"]
MALFORMED = {"nan": "aren't finite", "wrong-shape": "has shape"}


def updates(clients: int) -> np.ndarray:
    """About (1, 1, 1, 1, 1) each; client 0 is the one that may turn malicious."""
    return 1 + np.random.default_rng(1).normal(scale=0.1, size=(clients, VALUES)).astype(np.float32)


def client_of(clients: int, threat: Threat | None) -> Callable[[Message, Context], Message]:
    moves = updates(clients)

    def train(message: Message, context: Context) -> Message:
        config = message.content["config"]
        received = decode(message.content["arrays"], config, FIRST, "fp32")
        move = torch.from_numpy(moves[int(context.node_config["partition-id"])])
        tuned = {"adapter.0.w": received["adapter.0.w"] + move[:4].reshape(2, 2)}
        tuned["adapter.1.b"] = received["adapter.1.b"] + move[4:]
        arrays, notes = encode(tuned, FIRST)
        own = ConfigRecord({**notes, "client": str(context.node_config["name"])})
        metrics = MetricRecord({"num-examples": 1, "train_loss": 1.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics, "config": own}), reply_to=message)

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return Adder(lambda node, r: 0.0)(message, context)
        return train(message, context) if threat is None else threat.mod(message, context, train)

    return client


def federate(case: tuple[str, dict[str, Any], int], attack: str | None) -> tuple[OffsiteTuning, np.ndarray]:
    """The strategy after one round, and the aggregated update."""
    base, options, clients = case
    nodes = {100 + i: {"name": f"site-{i}", "partition-id": i} for i in range(clients)}
    strategy = wrap(make_strategy(base, fraction_evaluate=0.0, **all_nodes(clients)), **options)
    after = run(strategy, FakeGrid(client_of(clients, Threat(attack) if attack else None), nodes))
    return strategy, np.concatenate([(after[name] - FIRST[name]).numpy().ravel() for name in FIRST])


def distance(update: np.ndarray, clients: int) -> float:
    """To the mean of the honest clients."""
    return float(np.linalg.norm(update - updates(clients)[1:].mean(axis=0)))


@pytest.mark.parametrize("attack", WELL_FORMED)
@pytest.mark.parametrize("name", ROBUST)
def test_robust_strategies_stay_within_the_honest_range(name: str, attack: str) -> None:
    strategy, found = federate(ROBUST[name], attack)
    honest = updates(ROBUST[name][2])[1:]
    assert not strategy.history[1].skipped and not strategy.history[1].dropped
    assert (honest.min(axis=0) - 1e-5 <= found).all() and (found <= honest.max(axis=0) + 1e-5).all()


@pytest.mark.parametrize("attack", ["sign-flip", "scale:factor=10", "sign-flip+scale:factor=10", "free-rider"])
def test_the_plain_average_moves_by_a_fifth_of_what_the_attacker_wants(attack: str) -> None:
    factor = {"sign-flip": -1, "scale:factor=10": 10, "sign-flip+scale:factor=10": -10, "free-rider": 0}[attack]
    moves = updates(5)
    wanted = factor * moves[0] - moves[1:].mean(axis=0)
    assert np.allclose(federate(PLAIN, attack)[1], moves[1:].mean(axis=0) + wanted / 5, atol=1e-5)


def test_flipped_and_scaled_ruins_the_plain_average_only() -> None:
    attack = "sign-flip+scale:factor=10"
    plain = federate(PLAIN, attack)[1]
    assert distance(plain, 5) > 4.5 and plain.mean() < -1  # the opposite of what all honest clients want
    for name, case in ROBUST.items():
        assert distance(federate(case, attack)[1], case[2]) < 0.3, name
    for options, _ in SCREENED.values():
        assert distance(federate(("fedavg", options, 5), attack)[1], 5) < 1e-5


@pytest.mark.parametrize("attack", WELL_FORMED)
@pytest.mark.parametrize("name", SCREENED)
def test_screening_keeps_out_what_it_is_for_and_nothing_else(name: str, attack: str) -> None:
    options, kept_out = SCREENED[name]
    strategy, found = federate(("fedavg", options, 5), attack)
    assert [dropped.node for dropped in strategy.history[1].dropped] == ["site-0"] * (attack in kept_out)
    if attack in kept_out:
        assert distance(found, 5) < 1e-5


def test_screening_keeps_all_of_the_honest() -> None:
    for options, _ in SCREENED.values():
        strategy, found = federate(("fedavg", options, 5), None)
        assert not strategy.history[1].dropped and np.allclose(found, updates(5).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("attack", WELL_FORMED)
def test_clipping_bounds_what_one_client_can_do(attack: str) -> None:
    strategy, found = federate(("fedavg", {"clip_update_norm": CLIP}, 5), attack)
    honest = updates(5)[1:]
    assert np.linalg.norm(honest, axis=1).max() < CLIP
    assert distance(found, 5) <= (CLIP + float(np.linalg.norm(honest.mean(axis=0)))) / 5 + 1e-5
    longer = ("scale:factor=10", "sign-flip+scale:factor=10", "noise:std=10")
    assert strategy.history[1].clipped == (attack in longer)


@pytest.mark.parametrize("attack", MALFORMED)
@pytest.mark.parametrize("name", ["fedavg", "clipped", *SCREENED, *ROBUST])
def test_what_is_malformed_never_reaches_a_strategy(name: str, attack: str) -> None:
    options = {"clipped": {"clip_update_norm": CLIP}, **{key: case[0] for key, case in SCREENED.items()}}
    case = ROBUST.get(name, ("fedavg", options.get(name, {}), 5))
    strategy, found = federate(case, attack)
    (dropped,) = strategy.history[1].dropped
    assert dropped.node == "site-0" and MALFORMED[attack] in dropped.reason
    honest = updates(case[2])[1:]
    assert (honest.min(axis=0) - 1e-5 <= found).all() and (found <= honest.max(axis=0) + 1e-5).all()
    if case[0] == "fedavg":
        assert distance(found, case[2]) < 1e-5


def test_bulyan_with_five_clients_leaves_the_adapter() -> None:
    strategy, found = federate(("bulyan:num-malicious-nodes=1", {}, 5), None)
    assert strategy.history[1].skipped and not found.any()


def test_every_attack_on_replies_is_in_the_matrix() -> None:
    named = {part.partition(":")[0] for spec in [*WELL_FORMED, *MALFORMED] for part in spec.split("+")}
    assert named == set(ATTACKS) - {"label-flip"}  # which needs a model: simulations/benchmarks/attacks.py
