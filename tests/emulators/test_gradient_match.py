"""Backward elimination by the adapter's gradients: on hand-made values, against plain surgery, and what it promises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite_fl.emulators import gradient_match
from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.block_trials import BlockTrials
from offsite_fl.emulators.choice import keep_places
from offsite_fl.emulators.gradient_match import GradientMatching, eliminate, number_of_trials
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.blocks import find_blocks
from tests.emulators.trained import trained_llama

MakeContext = Callable[..., Context]
Pico = Callable[..., nn.Module]


# Elimination


def test_greedy_by_hand() -> None:
    """Without 2 it is 8, better than without 1 or 3; then {1} with 5 is better than {3}. {2} with 7.5 is missed."""
    values = {(1, 2, 3): 9.0, (2, 3): 7.0, (1, 3): 8.0, (1, 2): 6.0, (1,): 5.0, (3,): 4.0, (2,): 7.5}
    assert eliminate((1, 2, 3), 1, lambda left: values[tuple(left)]) == ((1,), 5.0)
    assert eliminate((1, 2, 3), 2, lambda left: values[tuple(left)]) == ((1, 3), 8.0)


def test_of_equal_ones_the_last_goes() -> None:
    for pool in (0, 1, 2):
        assert eliminate((1, 2, 3, 4), 2, lambda left: 1.0, pool) == ((1, 2), 1.0)


def additive(worth: dict[int, float], tried: list[tuple[int, ...]]) -> Callable[[Sequence[int]], float]:
    """The value of places is the sum of what they are worth; ``tried`` notes what was asked."""

    def value(left: Sequence[int]) -> float:
        tried.append(tuple(left))
        return sum(worth[place] for place in left)

    return value


@pytest.mark.parametrize("pool", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_where_places_do_not_depend_on_each_other_any_pool_will_do(pool: int, count: int) -> None:
    worth = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.2, 5: 0.7}
    tried: list[tuple[int, ...]] = []
    kept, value = eliminate(tuple(worth), count, additive(worth, tried), pool)
    assert kept == tuple(sorted(sorted(worth, key=worth.__getitem__)[5 - count :]))
    assert value == pytest.approx(sum(worth[place] for place in kept))
    assert len(tried) == number_of_trials(5, count, pool)


def test_the_pool_is_of_those_that_cost_least_when_last_tried() -> None:
    """The costs are 1: .5, 2: .1, 3: .9, 4: .2, 5: .7. Without 2 the next to try are 4 and 1; without 4, 1 and 5."""
    worth = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.2, 5: 0.7}
    tried: list[tuple[int, ...]] = []
    eliminate(tuple(worth), 2, additive(worth, tried), pool=2)
    gone = [{1, 2, 3, 4, 5} - set(left) for left in tried]
    assert gone[0] == set() and sorted(map(min, gone[1:6])) == [1, 2, 3, 4, 5] and all(len(g) == 1 for g in gone[1:6])
    assert gone[6:] == [{2, 4}, {2, 1}, {2, 4, 1}, {2, 4, 5}]


def test_costs_count_from_the_round_they_were_tried_in() -> None:
    """Of 1.0 the five cost .5, .55, .6, .65, .68, so that 1 goes; of the .5 that are left, 2 costs .1 and 3 costs .2.

    So 2 goes, and the next to try are 3 and 4, though the values last seen of 4 (.35) and 5 (.32) are above 3's (.3).
    """
    gone = {
        "": 1.0, "1": 0.5, "2": 0.45, "3": 0.4, "4": 0.35, "5": 0.32, "12": 0.4, "13": 0.3, "123": 0.35, "124": 0.1,
    }  # fmt: skip
    tried: list[str] = []

    def value(left: Sequence[int]) -> float:
        tried.append("".join(place for place in "12345" if int(place) not in left))
        return gone[tried[-1]]

    assert eliminate((1, 2, 3, 4, 5), 2, value, pool=2) == ((4, 5), 0.35)
    assert tried[6:] == ["12", "13", "123", "124"]


def test_number_of_trials_by_hand() -> None:
    """26 to 13: all of 26, and 25 + 24 + ... + 14 = 234 in the later rounds, or 12 times 4; and one to begin with."""
    assert number_of_trials(26, 13, 0) == 1 + 26 + 234
    assert number_of_trials(26, 13, 4) == 1 + 26 + 48
    assert number_of_trials(4, 1, 3) == 1 + 4 + 3 + 2


# Against plain surgery


def plain_gradients(model: nn.Module, kept: Sequence[int], batches: Sequence[Batch]) -> Tensor:
    """The gradient of blocks 0 and 5 in a copy of ``model`` that has ``kept`` between them, flat, by transformers."""
    copied: Any = copy.deepcopy(model)
    path = find_blocks(model).path
    parent, _, leaf = path.rpartition(".")
    stack = copied.get_submodule(path)
    front, behind = stack[0], stack[5]
    setattr(copied.get_submodule(parent), leaf, nn.ModuleList([front, *(stack[i] for i in kept), behind]))
    copied.config.num_hidden_layers = len(kept) + 2
    parameters = [*front.parameters(), *behind.parameters()]
    total = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        loss = copied(**batch, use_cache=False).loss * tokens
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
    return torch.cat([t.flatten() for t in total])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_greedy_by_plain_surgery(family: str, pico: Pico, context_of: MakeContext) -> None:
    model = pico(family)
    context = context_of(model)
    full = plain_gradients(model, (1, 2, 3, 4), context.calibration)

    def cosine(kept: Sequence[int]) -> float:
        ours = plain_gradients(model, kept, context.calibration)
        return float(nn.functional.cosine_similarity(ours.double(), full.double(), dim=0))

    left = [1, 2, 3, 4]
    while len(left) > 1:
        rest = {gone: [i for i in left if i != gone] for gone in left}
        cosines = {gone: cosine(kept) for gone, kept in rest.items()}
        best = sorted(cosines.values())[-2:]
        assert best[1] - best[0] > 1e-4, "a tie would tell nothing"
        left = rest[max(cosines, key=cosines.__getitem__)]
        assert GradientMatching(len(left), pool=0).compress(start(context), context).positions == tuple(left)
    trials = BlockTrials(start(context), context, context.calibration)
    assert trials.cosine((1, 4)) == pytest.approx(cosine((1, 4)), abs=1e-4)


def test_trials_are_what_a_client_would_get(family: str, pico: Pico, context_of: MakeContext) -> None:
    """In every family, sliding windows included: leaving places out equals building the network without them."""
    context = context_of(pico(family), adapter=(0, 3, 5))
    trials = BlockTrials(start(context), context, context.calibration)
    full = full_gradients(context, context.calibration)
    for kept in ((1, 2, 4), (2, 4), (1,), (1, 2)):
        ours = emulator_gradients(keep_places(start(context), kept), context, context.calibration)
        assert trials.cosine(kept) == pytest.approx(match_gradients(ours, full).cosine, abs=1e-5)


# What it promises


def test_every_family(family: str, pico: Pico, context_of: MakeContext) -> None:
    method = parse_emulator("gradient-match:keep=2,tokens=64")
    assert parse_emulator(str(method)) == method and str(method) == "gradient-match:keep=2,tokens=64"
    context = context_of(pico(family))
    before = {key: tensor.clone() for key, tensor in context.model.state_dict().items()}
    flags = [p.requires_grad for p in context.model.parameters()]
    built = method.compress(start(context), context)
    assert len(built.positions) == 2 and set(built.positions) <= set(context.middle)
    assert all(built.at(position) is context.block(position) for position in built.positions)
    assert [block.origin for block in built.blocks] == list(built.positions) and built.notes == ()
    assert method.compress(start(context), context).positions == built.positions
    assert all(torch.equal(tensor, before[key]) for key, tensor in context.model.state_dict().items())
    assert [p.requires_grad for p in context.model.parameters()] == flags
    assert not any("forward" in vars(module) or module._forward_hooks for module in context.model.modules())
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert logits.shape == (4, 16, 64) and bool(torch.isfinite(logits).all())


def test_better_than_random_blocks_on_text_it_did_not_see() -> None:
    """A pico LLaMA that learned its text: two of four blocks, against the mean over all six pairs."""
    model, batches, unseen = trained_llama()
    context = Context(model, find_blocks(model), (0, 5), (1, 2, 3, 4), calibration=batches)
    full = full_gradients(context, unseen)

    def cosine(kept: tuple[int, ...]) -> float:
        emulator = keep_places(start(context), kept)
        return match_gradients(emulator_gradients(emulator, context, unseen), full).cosine

    every = {pair: cosine(pair) for pair in combinations((1, 2, 3, 4), 2)}
    kept = GradientMatching(2, pool=2).compress(start(context), context).positions
    assert every[kept] > sum(every.values()) / len(every) + 0.1  # type: ignore[index]


@pytest.mark.parametrize("idle", [(1,), (4,), (2, 4), (1, 3, 4)])
def test_idle_blocks_go_first(idle: tuple[int, ...], pico_llama: nn.Module, context_of: MakeContext) -> None:
    """They hand their input on, so that without them the gradients are the full model's."""
    context = context_of(pico_llama)
    with torch.no_grad():
        for index in idle:
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                context.block(index).get_submodule(path).weight.zero_()  # type: ignore[operator]
    built = GradientMatching(4 - len(idle)).compress(start(context), context)
    assert built.positions == tuple(i for i in context.middle if i not in idle)
    assert BlockTrials(start(context), context, context.calibration).cosine(built.positions) == pytest.approx(1)


@pytest.mark.parametrize(("keep", "count"), [("1", 1), ("4", 4), ("0.25", 1), ("0.5", 2), ("0.76", 3)])
def test_shares_and_numbers(keep: str, count: int, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    method = parse_emulator(f"gradient-match:keep={keep},tokens=16")
    assert len(method.compress(start(context), context).positions) == count


def test_what_comes_in_may_have_holes_and_shared_blocks(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Places are left out one by one, though two run the same block; against networks built without them."""
    context = context_of(pico_llama)
    given = Emulator([EmulatorBlock(context.block(i), i) for i in (1, 4)], {1: 0, 3: 0, 4: 1})
    full = full_gradients(context, context.calibration)
    cosines = {}
    for kept in combinations((1, 3, 4), 2):
        ours = emulator_gradients(keep_places(given, kept), context, context.calibration)
        cosines[kept] = match_gradients(ours, full).cosine
    built = GradientMatching(2).compress(given, context)
    assert built.positions == max(cosines, key=lambda kept: cosines[kept])
    assert all(built.at(position) is given.at(position) for position in built.positions)


@pytest.mark.parametrize(
    "spec",
    [
        "quantize+gradient-match:keep=2",
        "low-rank:keep=0.5,mode=plain+gradient-match:keep=2",
        "scaleot:alpha=0.5,rank-keep=0.5,steps=2,rank=4+gradient-match:keep=2",
        "gradient-match:keep=2+quantize",
    ],
)
def test_in_a_chain(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = parse_emulator(spec).compress(start(context), context)
    assert len(built.positions) == 2 and set(built.positions) <= {1, 2, 3, 4}
    assert bool(torch.isfinite(emulated_network(built, context)(**context.calibration[0]).logits).all())


def test_it_reads_no_more_text_than_asked_for(
    pico_llama: nn.Module, context_of: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Counting(BlockTrials):
        def __init__(self, emulator: Emulator, context: Context, batches: Sequence[Batch]) -> None:
            read.append(sum(batch["input_ids"].numel() for batch in batches))
            super().__init__(emulator, context, batches)

    monkeypatch.setattr(gradient_match, "BlockTrials", Counting)
    context = context_of(pico_llama)
    for tokens in (2, 16, 47, 100, 10_000):
        GradientMatching(3, tokens=tokens).compress(start(context), context)
    assert read == [16, 16, 32, 96, 192]


# Refusals


def test_text_is_needed_to_choose(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="gradient-match needs calibration text"):
        GradientMatching(2).compress(start(context), context)
    assert GradientMatching(4).compress(start(context), context).positions == (1, 2, 3, 4)


def test_more_than_there_are(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match="gradient-match can't keep 5 of 4 middle blocks"):
        GradientMatching(5).compress(start(context), context)


def test_text_without_anything_to_predict(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    silent = tuple({**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in context.calibration)
    with pytest.raises(EmulatorError, match="gradients on the calibration text are zero or not finite"):
        GradientMatching(2).compress(start(context), replace(context, calibration=silent))


def test_gradients_that_are_no_numbers_count_as_opposite(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """A block whose weights aren't numbers goes first, wherever it is."""
    context = context_of(pico_llama)
    blocks = [EmulatorBlock(copy.deepcopy(context.block(i)), i) for i in context.middle]
    with torch.no_grad():
        next(blocks[1].module.parameters()).fill_(float("nan"))
    given = Emulator(blocks, {1: 0, 2: 1, 3: 2, 4: 3})
    assert BlockTrials(given, context, context.calibration).cosine((1, 2, 3, 4)) == -1
    assert GradientMatching(3).compress(given, context).positions == (1, 3, 4)


@pytest.mark.parametrize(
    ("options", "match"), [({"tokens": 1}, "tokens"), ({"pool": -1}, "pool"), ({"keep": 0}, "keep")]
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        GradientMatching(**options)
