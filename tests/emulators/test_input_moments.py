"""Second moments of inputs against the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.input_moments import input_moments
from offsite_fl.errors import EmulatorError

MakeContext = Callable[..., Context]


def slow_moments(context: Context, index: int) -> dict[str, Tensor]:
    """E[x x'] over real tokens of what the full model's linears read, by hooks on the whole model."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for batch in context.calibration:
        kept = batch["attention_mask"].bool()
        seen: dict[str, Tensor] = {}

        def note(path: str, seen: dict[str, Tensor] = seen) -> Callable[..., None]:
            return lambda _, args: seen.update({path: args[0].detach()})

        handles = [m.register_forward_pre_hook(note(path)) for path, m in dense_linears(context.block(index))]
        context.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        for path, x in seen.items():
            rows = x.reshape(*kept.shape, -1)[kept].double()
            sums[path] = sums.get(path, torch.zeros(rows.shape[1], rows.shape[1]).double()) + rows.T @ rows
        tokens += int(kept.sum())
    return {path: total / tokens for path, total in sums.items()}


def test_against_hooks_on_the_model(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    context = context_of(pico(family))
    found = dict(input_moments(start(context), context, context.calibration, "moments"))
    assert list(found) == [0, 1, 2, 3]
    for slot in (0, 3):
        expected = slow_moments(context, slot + 1)
        assert found[slot].keys() == expected.keys()
        for path, moments in found[slot].items():
            assert_close(moments, expected[path], rtol=1e-3, atol=1e-4)


def test_shared_blocks_and_holes(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    shared = Emulator([EmulatorBlock(context.block(i), i) for i in (4, 2)], {2: 1, 3: 1, 4: 0})
    found = dict(input_moments(shared, context, context.calibration, "moments"))
    assert list(found) == [1, 0]
    for slot, index in ((1, 2), (0, 4)):
        for path, moments in slow_moments(context, index).items():
            assert_close(found[slot][path], moments, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_not_finite(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with torch.no_grad():
        context.block(0).get_submodule("mlp.down_proj").weight.fill_(torch.inf)  # type: ignore[operator]
    with pytest.raises(EmulatorError, match="aren't finite on the calibration text"):
        list(input_moments(start(context), context, context.calibration, "moments"))


def test_only_what_is_wanted(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """With values come queries and keys, which read the same tensor; inputs of the others aren't looked at."""
    context = context_of(pico_llama)
    expected = slow_moments(context, 2)
    with torch.no_grad():
        context.block(4).get_submodule("mlp.up_proj").weight.fill_(torch.inf)  # type: ignore[operator]
    given = start(context), context, context.calibration, "moments"
    found = dict(input_moments(*given, lambda path: path.endswith("v_proj")))
    assert all(moments.keys() == {f"self_attn.{x}_proj" for x in "qkv"} for moments in found.values())
    for path, moments in found[1].items():
        assert_close(moments, expected[path], rtol=1e-3, atol=1e-4)
    assert dict(input_moments(*given, lambda _: False)) == {slot: {} for slot in range(4)}
    with pytest.raises(EmulatorError, match=r"mlp\.down_proj in block 4 aren't finite"):
        list(input_moments(*given))
