"""Hidden states on their way through the blocks equal the model's own; capturing the calls costs no forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.streams import Stream, merged, read_batches, running_order, working_copy
from offsite_fl.models.walk import capture_calls

MakeContext = Callable[..., Context]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_calls_are_those_of_a_whole_forward_pass(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """The one place where the shortcut could differ: whatever depends on what earlier blocks computed."""
    context = context_of(pico(family))
    [batch] = merged(context.calibration)
    [read] = read_batches(context, context.calibration)
    for quick, whole in zip(read.calls, capture_calls(context.model, context.blocks, batch), strict=True):
        assert same(quick.args, whole.args) and same(dict(quick.kwargs), dict(whole.kwargs))
    assert not any("forward" in block.__dict__ for block in map(context.block, range(6)))


def test_streams_are_the_models_hidden_states(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    stream = Stream.entering(read_batches(context, context.calibration))
    [batch] = merged(context.calibration)
    with torch.no_grad():
        states = context.model(**batch, output_hidden_states=True).hidden_states
    for position in range(5):
        stream = stream.through(working_copy(context.block(position), "cpu"), position)
        ours, theirs = stream.batches[0].rows(stream.hidden[0]), stream.batches[0].rows(states[position + 1])
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out(batches: tuple[Batch, ...], pico_llama: nn.Module, context_of: MakeContext) -> None:
    [read] = read_batches(context_of(pico_llama), batches)
    rows = read.rows(torch.arange(3 * 4 * 16).view(12, 16, 1))
    assert rows.shape == (3 * (4 * 16 - 5), 1)
    assert 16 + 10 in rows and 16 + 11 not in rows


def test_capturing_runs_one_block_only(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context, ran = context_of(pico_llama), []
    for index in range(6):
        context.block(index).get_submodule("mlp").register_forward_hook(lambda *_, i=index: ran.append(i))
    read_batches(context, context.calibration)
    assert ran == [0]


def test_a_forward_of_the_users_own_stays(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    block = context.block(3)
    own = block.forward
    block.forward = own
    read_batches(context, context.calibration)
    assert block.__dict__["forward"] is own


def ones(rows: int, length: int) -> Batch:
    return {"input_ids": torch.full((rows, length), rows), "attention_mask": torch.ones(rows, length)}


def test_small_batches_are_merged() -> None:
    batches = [ones(2, 8), ones(3, 8), ones(4, 8), ones(1, 5), ones(9, 8)]
    sizes = [tuple(batch["input_ids"].shape) for batch in merged(batches, tokens=40)]
    assert sizes == [(5, 8), (4, 8), (1, 5), (9, 8)]
    assert merged(batches, tokens=40)[0]["input_ids"][:, 0].tolist() == [2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("adapter", "places", "expected"),
    [
        ((0, 5), (1, 2, 3, 4), [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ((0, 5), (1, 4), [(0, 1), (1, 4), (4, 5)]),
        ((4, 5), (0, 1), [(0, 1), (1, 4)]),
        ((0,), (2, 4), [(0, 2), (2, 4), (4, 6)]),
    ],
)
def test_running_order(adapter: tuple[int, ...], places: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert running_order(adapter, places, 6) == expected
