"""Where the adapter lies: the rank rule on the published lists, and the split found for a model."""

from __future__ import annotations

import typing
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from offsite_fl.emulators import cka
from offsite_fl.emulators.base import Context
from offsite_fl.emulators.placement import Neighbours, Pooling, spread_ranks, spread_split
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.split import Split

MakeContext = Callable[..., Context]

# Adapter and frozen blocks as released with CRaSh.
RELEASED = [
    ("OPT-1.3B ARC-E, ARC-C, WebQs", "0,5,18,23", "1,2,3,9,12,15,20,22"),
    ("OPT-1.3B HellaSwag", "0,5,12,23", "1,2,3,8,10,11,17,22"),
    ("OPT-1.3B OBQA", "0,8,19,23", "1,4,6,10,12,15,21,22"),
    ("OPT-6.7B OBQA, PIQA, SciQ, RACE", "0,8,17,31", "1,2,3,5,6,7,9,10,11,12,13,15,20,22,23,24,27,30"),
    ("OPT-6.7B ARC, WebQs", "0,9,16,31", "1,2,3,5,7,8,10,11,12,13,14,15,19,22,24,25,28,30"),
    ("OPT-6.7B HellaSwag", "0,7,14,31", "1,2,3,4,5,6,8,9,10,11,12,13,15,16,17,21,27,30"),
]
# An older run's list, which the rule doesn't give: it names 7 and 18.
EXCEPTION = ("OPT-1.3B ARC-E", "0,10,16,23", "1,2,5,7,13,18,21,22")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@pytest.mark.parametrize(("name", "adapter", "frozen"), RELEASED)
def test_the_rank_rule_gives_the_released_adapters(name: str, adapter: str, frozen: str) -> None:
    kept = sorted(numbers(adapter) + numbers(frozen))
    assert len(kept) == (12 if "1.3B" in name else 22)
    assert [kept[rank] for rank in spread_ranks(len(kept), 4)] == numbers(adapter)


def test_the_known_exception() -> None:
    _, adapter, frozen = EXCEPTION
    kept = sorted(numbers(adapter) + numbers(frozen))
    assert [kept[rank] for rank in spread_ranks(12, 4)] == [0, 7, 18, 23]


def test_ranks_by_hand() -> None:
    """ceil(i * 6 / 2) of 7, ceil(i * 6 / 4), ceil(i * 7 / 3) = 0, 2.33, 4.67, 7 of 8."""
    assert spread_ranks(7, 3) == (0, 3, 6)
    assert spread_ranks(7, 5) == (0, 2, 3, 5, 6)
    assert spread_ranks(8, 4) == (0, 3, 5, 7)


def test_ranks_are_different_and_end_at_the_ends() -> None:
    for kept in range(3, 60):
        for adapter in range(2, kept):
            ranks = spread_ranks(kept, adapter)
            assert len(set(ranks)) == adapter and (ranks[0], ranks[-1]) == (0, kept - 1)


@pytest.mark.parametrize(("kept", "adapter"), [(12, 1), (12, 0), (4, 4), (3, 4)])
def test_numbers_that_cannot_be_spread(kept: int, adapter: int) -> None:
    with pytest.raises(ConfigError, match=f"adapter of {adapter} can't be spread over {kept} kept blocks"):
        spread_ranks(kept, adapter)


def test_every_pooling_has_a_name_in_specs() -> None:
    assert [name.replace("-", "_") for name in typing.get_args(Pooling)] == list(cka.POOLINGS)


def with_states(monkeypatch: pytest.MonkeyPatch, alike: list[float]) -> list[str]:
    """Let neighbours be as alike as ``alike`` says; returns the poolings that were asked for."""
    asked: list[str] = []

    def states(context: Context, pooling: str) -> list[torch.Tensor]:
        asked.append(pooling)
        return [torch.full((3, 1), float(i)) for i in range(len(alike) + 1)]

    monkeypatch.setattr(cka, "pooled_states", states)
    monkeypatch.setattr(cka, "linear_cka", lambda x, y: alike[int(x[0, 0])] if y[0, 0] == x[0, 0] + 1 else 1 / 0)
    return asked


def test_the_split_by_hand(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """Eight blocks in five clusters: 0 | 1 2 | 3 4 5 | 6 | 7, centres 0 2 4 6 7; ranks 0, 2, 4 of five."""
    context = context_of(pico("llama", num_hidden_layers=8), adapter=(7,))
    asked = with_states(monkeypatch, [0.1, 0.8, 0.2, 0.9, 0.7, 0.3, 0.4])
    assert Neighbours(context, range(8), "max-nonpad").centres(5) == (0, 2, 4, 6, 7)
    assert spread_split(context, keep=5, adapter=3) == Split(at=(0, 4, 7))
    assert asked == ["max_nonpad", "mean_weighted"]


def test_clusters_stay_on_their_side_of_an_adapter_block(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """Middle 1 2 | 4 5 6 of eight: 2 and 4 are never compared, however few clusters are wanted."""
    context = context_of(pico("llama", num_hidden_layers=8), adapter=(0, 3, 7))
    with_states(monkeypatch, [9.0, 0.1, 9.0, 9.0, 0.3, 0.2, 9.0])
    near = Neighbours(context, context.middle, "mean", between=context.adapter)
    assert near.stretches == 2
    assert near.centres(4) == (1, 2, 5, 6)  # 1 | 2 | 4 5 | 6
    assert near.centres(3) == (1, 2, 5)  # 1 | 2 | 4 5 6
    assert near.centres(2) == (2, 5)


def slow_similarities(context: Context) -> list[float]:
    """Linear CKA of mean-weighted hidden states, by Hugging Face's own hidden states and the HSIC formula."""
    rows: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for batch in context.calibration:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = context.model(**inputs, output_hidden_states=True).hidden_states[1:]
        for layer, state in enumerate(states):
            for h, mask in zip(state.double(), batch["attention_mask"], strict=True):
                weight = torch.tensor([(t + 1) * int(m) for t, m in enumerate(mask)]).double()
                rows[layer].append((weight[:, None] * h).sum(0) / weight.sum())
    z = [torch.stack(layer) for layer in rows]
    centring = torch.eye(len(z[0])).double() - 1 / len(z[0])

    def hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((centring @ x @ x.T @ centring) * (centring @ y @ y.T @ centring)).sum()

    return [float(hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()) for a, b in pairwise(z)]


def test_similarities_of_a_model_against_a_slow_version(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    found = Neighbours(context, range(6), "mean-weighted").similarities
    assert list(found) == pytest.approx(slow_similarities(context), abs=1e-5)


def test_the_split_is_the_same_whatever_split_the_context_has(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    model = pico(family)
    first, second = (spread_split(context_of(model, adapter), keep=5, adapter=3) for adapter in ((5,), (0, 2, 4)))
    assert first == second
    assert first.at is not None and len(first.at) == 3
    assert spread_split(context_of(model), keep=6, adapter=2) == Split(at=(0, 5))


def test_what_does_not_fit(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(ConfigError, match="7 blocks can't be kept: the model has 6"):
        spread_split(context, keep=7, adapter=2)
    with pytest.raises(ConfigError, match="unknown pooling 'median'"):
        spread_split(context, keep=4, adapter=2, pooling="median")  # type: ignore[arg-type]
    with pytest.raises(EmulatorError, match="needs calibration text"):
        spread_split(context_of(pico_llama, calibration=()), keep=4, adapter=2)


def test_two_examples_say_nothing(pico_llama: nn.Module, context_of: MakeContext) -> None:
    two = {name: value[:2] for name, value in context_of(pico_llama).calibration[0].items()}
    with pytest.raises(EmulatorError, match=r"takes 3 or more: give more calibration text than 2 example\(s\)"):
        spread_split(context_of(pico_llama, calibration=(two,)), keep=4, adapter=2)
