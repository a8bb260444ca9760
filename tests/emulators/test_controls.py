"""The controls: random, first, last and most-changing blocks. What all of them promise, then each against its rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.first_last import FirstBlocks, LastBlocks
from offsite_fl.emulators.random_blocks import RandomBlocks
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.similarity import Similarity, block_similarity
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError

MakeContext = Callable[..., Context]
CONTROLS = ("random", "first", "last", "similarity")


@pytest.mark.parametrize("name", CONTROLS)
def test_every_family(name: str, family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    method = parse_emulator(f"{name}:keep=2")
    assert parse_emulator(str(method)) == method and str(method) == f"{name}:keep=2"
    context = context_of(pico(family))
    before = {key: tensor.clone() for key, tensor in context.model.state_dict().items()}
    built = method.compress(start(context), context)
    assert len(built.positions) == 2 and set(built.positions) <= set(context.middle)
    assert all(built.at(position) is context.block(position) for position in built.positions)
    assert [block.origin for block in built.blocks] == list(built.positions) and built.notes == ()
    assert all(torch.equal(tensor, before[key]) for key, tensor in context.model.state_dict().items())
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert logits.shape == (4, 16, 64) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(("keep", "count"), [("1", 1), ("4", 4), ("0.25", 1), ("0.5", 2), ("0.76", 3)])
def test_shares_and_numbers(name: str, keep: str, count: int, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    assert len(parse_emulator(f"{name}:keep={keep}").compress(start(context), context).positions) == count


@pytest.mark.parametrize("name", CONTROLS)
def test_what_comes_in_may_have_holes_and_shared_blocks(
    name: str, pico_llama: nn.Module, context_of: MakeContext
) -> None:
    context = context_of(pico_llama)
    given = Emulator([EmulatorBlock(context.block(i), i) for i in (1, 4)], {1: 0, 3: 0, 4: 1})
    for keep in (1, 2, 3):
        built = parse_emulator(f"{name}:keep={keep}").compress(given, context)
        assert len(built.positions) == keep and set(built.positions) <= {1, 3, 4}
        assert all(built.at(position) is given.at(position) for position in built.positions)
    chained = parse_emulator(f"layer-drop:keep=3+{name}:keep=2+quantize").compress(start(context), context)
    assert len(chained.positions) == 2 and set(chained.positions) <= {1, 3, 4}


@pytest.mark.parametrize("name", CONTROLS)
def test_more_than_there_are(name: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=f"{name} can't keep 5 of 4 middle blocks"):
        parse_emulator(f"{name}:keep=5").compress(start(context), context)


def test_first_and_last(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    assert FirstBlocks(3).compress(start(context), context).positions == (1, 2, 3)
    assert LastBlocks(3).compress(start(context), context).positions == (2, 3, 4)
    spread = context_of(pico_llama, adapter=(2, 5))
    assert FirstBlocks(2).compress(start(spread), spread).positions == (0, 1)
    assert LastBlocks(2).compress(start(spread), spread).positions == (3, 4)


def drawn(context: Context, keep: int = 2, seed: int | None = None) -> tuple[int, ...]:
    return RandomBlocks(keep, seed=seed).compress(start(context), context).positions


def test_every_draw_is_as_likely(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Two of four: six pairs, 100 each in 600 draws; 4 standard deviations are 4 * sqrt(600 * 1/6 * 5/6) = 36.5."""
    context = context_of(pico_llama, calibration=())
    counts = Counter(drawn(context, seed=seed) for seed in range(600))
    assert set(counts) == set(combinations((1, 2, 3, 4), 2))
    assert all(64 <= count <= 136 for count in counts.values())


def test_the_seed_decides(pico_llama: nn.Module, context_of: MakeContext) -> None:
    contexts = [context_of(pico_llama, calibration=(), seed=seed) for seed in range(10)]
    of_context = [drawn(context) for context in contexts]
    assert len(set(of_context)) > 1
    assert of_context == [drawn(context) for context in contexts]
    # the method's own seed goes before the context's, and 0 is a seed
    assert of_context == [drawn(contexts[3], seed=seed) for seed in range(10)]


def test_seeds_in_a_spec() -> None:
    assert parse_emulator("random:keep=3,seed=7") == RandomBlocks(3, seed=7)
    assert str(RandomBlocks(3, seed=0)) == "random:keep=3,seed=0"
    assert parse_emulator("random:keep=3,seed=") == RandomBlocks(3)
    with pytest.raises(ConfigError, match="seed must be 0 or above"):
        RandomBlocks(3, seed=-1)


def make_idle(context: Context, *indices: int) -> None:
    """These blocks hand their input on: what they add is zero."""
    with torch.no_grad():
        for index in indices:
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                context.block(index).get_submodule(path).weight.zero_()  # type: ignore[operator]


@pytest.mark.parametrize("idle", [(1,), (3,), (4,), (1, 2), (2, 4), (1, 3, 4)])
def test_idle_blocks_go_first(idle: tuple[int, ...], pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    make_idle(context, *idle)
    alike = block_similarity(context)
    assert len(alike) == 6
    assert [i for i in context.middle if alike[i] > 1 - 1e-9] == list(idle)
    built = Similarity(4 - len(idle)).compress(start(context), context)
    assert built.positions == tuple(i for i in context.middle if i not in idle)


def test_block_0_is_compared_with_the_embeddings(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, adapter=(4, 5))
    make_idle(context, 0)
    assert Similarity(3).compress(start(context), context).positions == (1, 2, 3)


def test_of_equal_blocks_the_first_stay(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    make_idle(context, 1, 2, 3, 4)
    assert Similarity(2).compress(start(context), context).positions == (1, 2)


def slow_cka(x: Tensor, y: Tensor) -> float:
    """From covariances: ``||X'Y||^2 / (||X'X|| ||Y'Y||)`` of centred states."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_the_ranking_from_the_models_own_hidden_states(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    kept = Similarity(2).compress(start(context), context).positions
    layers: list[list[Tensor]] = [[] for _ in range(7)]
    for batch in context.calibration:
        weights = (torch.arange(1, 17) * batch["attention_mask"]).double()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for number, hidden in enumerate(context.model(**inputs, output_hidden_states=True).hidden_states):
            layers[number].append(torch.einsum("bt,bth->bh", weights / weights.sum(1, True), hidden.detach().double()))
    pooled = [torch.cat(rows) for rows in layers]
    alike = {i: slow_cka(pooled[i], pooled[i + 1]) for i in context.middle}
    assert kept == tuple(sorted(sorted(alike, key=alike.__getitem__)[:2]))
    assert block_similarity(context)[1:5] == pytest.approx([alike[i] for i in context.middle], rel=1e-6)


def test_similarity_needs_text(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="needs calibration text"):
        Similarity(2).compress(start(context), context)
