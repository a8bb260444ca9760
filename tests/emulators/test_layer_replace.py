"""Dynamic LayerReplace: the sampling and the scores by hand, what sampled networks are, and that they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators import layer_replace
from offsite_fl.emulators.base import Context, Emulator, start
from offsite_fl.emulators.layer_replace import (
    ReplaceableNetwork,
    Replacements,
    ReplaceOptions,
    draw_kept,
    replace_layers,
    rewarded,
)
from offsite_fl.emulators.report import emulated_network
from offsite_fl.errors import CheckpointError, EmulatorError
from offsite_fl.evaluation.loss import causal_nll, evaluate_loss
from offsite_fl.models.harmonizer import Harmonizer
from tests.conftest import make_pico

from .conftest import random_batches
from .trained import text_batches, train, trained_llama

MakeContext = Callable[..., Context]
OPTIONS = ReplaceOptions(steps=4, lr=1e-2, rank=4, group=4, samples=3, eta=0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Sampling


def test_exactly_half_of_each_group_is_kept() -> None:
    scores = torch.tensor([0.0, 3.0, -3.0, 0.5, 0.0, 0.0, 0.0, 9.0, 1.0, 2.0])
    for seed in range(200):
        kept = draw_kept(scores, 4, generator(seed))
        assert [int(kept[a:b].sum()) for a, b in ((0, 4), (4, 8), (8, 10))] == [2, 2, 1]


def test_the_median_of_an_odd_group_goes_either_way() -> None:
    counts = [int(draw_kept(torch.zeros(5), 5, generator(seed)).sum()) for seed in range(400)]
    assert set(counts) == {2, 3}
    assert abs(counts.count(3) - 200) < 60  # six deviations of a fair coin


def test_kept_are_those_of_the_larger_draws() -> None:
    """With p_i ~ U(0, a) and p_j ~ U(0, b), a <= b, the chance that i beats j is a / 2b."""
    scores = torch.tensor([-1.0, 1.5])
    a, b = (1 / (1 + math.exp(-s)) for s in scores.tolist())
    one = generator()
    kept = torch.stack([draw_kept(scores, 2, one) for _ in range(4000)])
    assert bool((kept.sum(1) == 1).all())
    assert abs(float(kept[:, 0].float().mean()) - a / (2 * b)) < 0.03
    equal = torch.stack([draw_kept(torch.zeros(8), 4, one) for _ in range(2000)]).float().mean(0)
    assert float((equal - 0.5).abs().max()) < 0.06


# Scores


def test_scores_by_hand() -> None:
    """Three networks of loss ln 2, ln 4, ln 4: exp(-L) = 1/2, 1/4, 1/4, mean 1/3, rewards 1/6, -1/12, -1/12."""
    s = [0.0, 1.0, -2.0]
    kept = [torch.tensor(k) for k in ([True, True, False], [True, False, False], [False, True, True])]
    rewards = [1 / 6, -1 / 12, -1 / 12]
    sums = [rewards[0] + rewards[1], rewards[0] + rewards[2], rewards[2]]
    expected = []
    for value, gain in zip(s, sums, strict=True):
        chance = 1 / (1 + math.exp(-value))
        expected.append(value + 0.1 * gain * chance * (1 - chance))
    got = rewarded(torch.tensor(s), kept, [math.log(2), math.log(4), math.log(4)], eta=0.1)
    assert_close(got, torch.tensor(expected))


def test_equal_losses_and_places_that_nobody_keeps_change_nothing() -> None:
    s = torch.tensor([0.3, -0.2])
    kept = [torch.tensor([True, False]), torch.tensor([True, False])]
    assert torch.equal(rewarded(s, kept, [2.0, 2.0], 1.0), s)
    assert rewarded(s, kept, [1.0, 3.0], 1.0)[1] == s[1]


# Sampled networks


def replaceable(context: Context, emulator: Emulator | None = None, returns: int = 0) -> ReplaceableNetwork:
    return ReplaceableNetwork(emulator or start(context), context, 4, 32, returns)


def test_a_sampled_network_by_hand(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext, batches: tuple[dict[str, Tensor], ...]
) -> None:
    """Fresh harmonizers hand their input on: keeping none is the adapter alone, keeping 1 and 3 drops 2 and 4."""
    context = context_of(pico(family))
    network = replaceable(context, returns=2 if family == "bloom" else 0)
    whole = start(context)
    for positions in ((), (1, 3), (1, 2, 3, 4)):
        network.use(torch.tensor([p in positions for p in network.positions]))
        blocks = [block for block in whole.blocks if block.origin in positions]
        plain = Emulator(blocks, {block.origin: slot for slot, block in enumerate(blocks)})
        nats, tokens = causal_nll(emulated_network(plain, context), batches[0])
        assert_close(network.loss(batches[0]).detach(), (nats / tokens).detach(), rtol=1e-5, atol=1e-5)


def test_no_weight_is_copied(pico_llama: nn.Module, context_of: MakeContext) -> None:
    network = replaceable(context_of(pico_llama))
    network.use(torch.tensor([True] * 4))
    owned = {parameter.data_ptr() for parameter in pico_llama.parameters()}
    assert {parameter.data_ptr() for parameter in network.network.parameters()} == owned
    assert not any(parameter.requires_grad for parameter in network.network.parameters())


def test_gradients_pass_frozen_blocks_to_harmonizers_in_front(
    pico_llama: nn.Module, context_of: MakeContext, batches: tuple[dict[str, Tensor], ...]
) -> None:
    network = replaceable(context_of(pico_llama))
    network.use(torch.tensor([False, True, True, True]))
    network.loss(batches[0]).backward()  # type: ignore[no-untyped-call]
    assert float(network.harmonizers[1].up.weight.grad.abs().sum()) > 0  # type: ignore[union-attr, operator]
    assert all(p.grad is None for q in (2, 3, 4) for p in network.harmonizers[q].parameters())
    assert all(p.grad is None for p in pico_llama.parameters())


def test_harmonizers_that_are_there_already_stay(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    given = start(context)
    given.blocks[1].module = Harmonizer(32, 4)
    assert replaceable(context, given).positions == (1, 3, 4)


# Training


def mean_loss(network: ReplaceableNetwork, batches: tuple[dict[str, Tensor], ...]) -> float:
    one, losses = generator(7), []
    with torch.no_grad():
        for _ in range(12):
            network.use(draw_kept(torch.zeros(len(network.positions)), 4, one))
            losses += [network.loss(batch).item() for batch in batches]
    return sum(losses) / len(losses)


def test_training_lowers_the_loss_of_replaced_networks(context_of: MakeContext) -> None:
    model, text, unseen = trained_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = context_of(model, calibration=text)
    network = replaceable(context)
    fresh = mean_loss(network, unseen)
    found = replace_layers(start(context), context, replace(OPTIONS, steps=60, rank=8), 32, 0)
    network.harmonizers = found.harmonizers
    learned, full = mean_loss(network, unseen), evaluate_loss(model, unseen).loss
    assert learned < fresh - 0.25 * (fresh - full)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for h in found.harmonizers.values() for p in h.parameters())


def test_networks_are_compared_on_another_batch_than_the_one_they_learn_from(
    pico_llama: nn.Module, context_of: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 6 of the method notes. A step trains on one batch and scores three networks on one; two see all four."""
    batches = random_batches(4)
    seen: list[tuple[bool, int]] = []
    loss_of = ReplaceableNetwork.loss

    def loss(self: ReplaceableNetwork, batch: dict[str, Tensor]) -> Tensor:
        seen.append((torch.is_grad_enabled(), next(i for i, one in enumerate(batches) if one is batch)))
        return loss_of(self, batch)

    monkeypatch.setattr(ReplaceableNetwork, "loss", loss)
    context = context_of(pico_llama, calibration=batches)
    replace_layers(start(context), context, OPTIONS, 32, 0)
    steps = [seen[first : first + 4] for first in range(0, len(seen), 4)]
    assert len(steps) == OPTIONS.steps and len(seen) == 4 * OPTIONS.steps
    for step in steps:
        assert [trains for trains, _ in step] == [True, False, False, False]
        (_, learned), *scored = step
        assert len(set(scored)) == 1 and scored[0][1] != learned
    for first, second in (steps[:2], steps[2:]):
        assert {number for _, number in first + second} == {0, 1, 2, 3}


def test_a_layer_that_does_nothing_gets_the_lowest_score(context_of: MakeContext) -> None:
    """Block 2 adds nothing to the stream. Who keeps it in its group of two keeps one that works less."""
    model: Any = make_pico("llama")
    idle = [model.model.layers[2].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight]

    def silence() -> None:
        with torch.no_grad():
            for weight in idle:
                weight.zero_()

    silence()
    train(model, text_batches(), 40, silence)
    context = context_of(model, calibration=text_batches())
    found = replace_layers(start(context), context, replace(OPTIONS, steps=30, lr=1e-6, eta=3.0), 32, 0)
    assert min(found.scores, key=lambda position: found.scores[position]) == 2
    assert found.scores[2] < 0


def test_equal_contexts_give_equal_results_and_seeds_matter(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    a, b, c = (replace_layers(start(x), x, OPTIONS, 32, 0) for x in (context, context, replace(context, seed=1)))
    assert same(a, b) and not same(a, c)


def same(a: Replacements, b: Replacements) -> bool:
    pairs = [(a.harmonizers[p].state_dict(), b.harmonizers[p].state_dict()) for p in a.harmonizers]
    return a.scores == b.scores and all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def test_harmonizers_have_the_dtype_of_the_model(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.to(torch.bfloat16))
    found = replace_layers(start(context), context, OPTIONS, 32, 0)
    assert {p.dtype for h in found.harmonizers.values() for p in h.parameters()} == {torch.bfloat16}


class Interrupted(Exception):
    """Stands for a killed process."""


def test_interrupted_and_resumed_equals_at_once(
    pico_llama: nn.Module, context_of: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, steps=9)
    context = context_of(pico_llama)
    at_once = replace_layers(start(context), context, options, 32, 0)
    monkeypatch.setattr(layer_replace, "SAVE_EVERY", 3)
    steps: list[int] = []
    step_of = layer_replace._Run.step

    def step(self: Any, number: int) -> float:
        if steps == [0, 1, 2, 3, 4]:
            steps.append(-1)
            raise Interrupted
        steps.append(number)
        return step_of(self, number)

    monkeypatch.setattr(layer_replace._Run, "step", step)
    resumable = replace(context, workdir=tmp_path)
    with pytest.raises(Interrupted):
        replace_layers(start(context), resumable, options, 32, 0)
    again = replace_layers(start(context), resumable, options, 32, 0)
    assert steps == [0, 1, 2, 3, 4, -1, 3, 4, 5, 6, 7, 8], "it must go on at the checkpoint, not begin anew"
    assert same(again, at_once)
    assert same(replace_layers(start(context), resumable, options, 32, 0), at_once)
    assert len(steps) == 12, "a finished run is read back"


def test_a_damaged_checkpoint_says_so(pico_llama: nn.Module, context_of: MakeContext, tmp_path: Path) -> None:
    context = context_of(pico_llama, workdir=tmp_path)
    replace_layers(start(context), context, OPTIONS, 32, 0)
    (path,) = tmp_path.rglob("state.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="delete it to start anew"):
        replace_layers(start(context), context, OPTIONS, 32, 0)


def test_progress_is_shown_when_asked_for(
    pico_llama: nn.Module, context_of: MakeContext, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(pico_llama)
    replace_layers(start(context), context, OPTIONS, 32, 0)
    assert capsys.readouterr().out == ""
    replace_layers(start(context), replace(context, progress=True), OPTIONS, 32, 0)
    assert "4/4" in capsys.readouterr().out


# Refusals


def test_one_batch_is_not_enough(
    pico_llama: nn.Module, context_of: MakeContext, batches: tuple[dict[str, Tensor], ...]
) -> None:
    context = context_of(pico_llama, calibration=batches[:1])
    with pytest.raises(EmulatorError, match="at least two"):
        replace_layers(start(context), context, OPTIONS, 32, 0)
    none = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="training harmonizers needs calibration text"):
        replace_layers(start(none), none, OPTIONS, 32, 0)


def test_a_loss_that_is_not_a_number_stops_the_run(pico_llama: nn.Module, context_of: MakeContext) -> None:
    with torch.no_grad():
        pico_llama.get_submodule("model.norm").weight[0] = torch.nan  # type: ignore[operator, index]
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=r"isn't finite at step 1; try a smaller lr"):
        replace_layers(start(context), context, OPTIONS, 32, 0)


def test_a_single_place_is_trained_too(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, adapter=(0, 1, 2, 4, 5))
    found = replace_layers(start(context), context, replace(OPTIONS, steps=6), 32, 0)
    assert float(found.harmonizers[3].up.weight.abs().sum()) > 0  # type: ignore[operator]
