"""Blocks run one by one outside the model give the states of the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import Blocks, block_list, find_blocks
from offsite_fl.models.walk import call_block, capture_calls

Pico = Callable[..., nn.Module]
Batch = dict[str, torch.Tensor]


def own_states(model: nn.Module, blocks: Blocks, batch: Batch) -> list[torch.Tensor]:
    """What each block returns in the model's own forward pass."""
    states: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in block_list(model, blocks)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_composition_equals_the_forward_pass(family: str, padding: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    blocks = find_blocks(model)
    batch = {"input_ids": pico_batch["input_ids"]}
    if padding != "none":
        batch["attention_mask"] = pico_batch["attention_mask"]
    if padding == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    expected = own_states(model, blocks, batch)
    calls = capture_calls(model, blocks, batch)
    assert [call.hidden is not None for call in calls] == [True] + [False] * 5
    hidden = calls[0].hidden
    assert hidden is not None and hidden.shape == (2, 12, 32)
    with torch.no_grad():
        for block, call, state in zip(block_list(model, blocks), calls, expected, strict=True):
            hidden = call_block(block, hidden, call)
            torch.testing.assert_close(hidden, state, rtol=0, atol=0)


def test_gradients_flow_through_a_block(family: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    blocks = find_blocks(model)
    calls = capture_calls(model, blocks, pico_batch)
    assert calls[0].hidden is not None
    block = block_list(model, blocks)[2]
    call_block(block, calls[0].hidden, calls[2]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_capture_leaves_the_model_as_it_was(family: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    blocks = find_blocks(model)
    before = model(**pico_batch).logits
    model.train()
    block_list(model, blocks)[1].eval()
    training = [module.training for module in model.modules()]
    capture_calls(model, blocks, pico_batch)
    assert [module.training for module in model.modules()] == training
    assert not any(block._forward_pre_hooks for block in block_list(model, blocks))
    assert torch.equal(model.eval()(**pico_batch).logits, before)


def test_no_cache_and_no_head_run(pico_llama: nn.Module, pico_batch: Batch) -> None:
    ran: list[str] = []
    pico_llama.lm_head.register_forward_hook(lambda *_: ran.append("head"))  # type: ignore[operator, union-attr]
    calls = capture_calls(pico_llama, find_blocks(pico_llama), pico_batch)
    assert not ran
    assert all(call.kwargs.get("past_key_values") is None and not call.kwargs.get("use_cache") for call in calls)


def test_gemma2_calls_carry_their_own_masks(pico: Pico, pico_batch: Batch) -> None:
    model = pico("gemma2")
    calls = capture_calls(model, find_blocks(model), pico_batch)
    sliding, full = (calls[index].kwargs["attention_mask"] for index in (0, 1))
    # the last token of the first row: a window of 4 sees 4 positions, the full mask all 12
    assert [
        int((mask[0, 0, -1] >= 0).sum() if mask.dtype != torch.bool else mask[0, 0, -1].sum())
        for mask in (sliding, full)
    ] == [4, 12]


class Strange(nn.Module):
    """Calls its blocks in an order, and in a way, that the test sets."""

    def __init__(self, order: list[int], by_name: str | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.order, self.by_name = order, by_name

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = input_ids.float()
        for index in self.order:
            hidden = self.layers[index](**{self.by_name: hidden}) if self.by_name else self.layers[index](hidden)
        return hidden


@pytest.mark.parametrize(
    ("order", "by_name", "message"),
    [
        ([0, 2, 1], None, "block 2 of 'layers' ran when block 1 was due"),
        ([0, 0, 1, 2], None, "block 0 of 'layers' ran when block 1 was due"),
        ([0, 1], None, "ran 2 of the 3 blocks"),
        ([0, 1, 2], "states", "without a hidden state"),
    ],
)
def test_other_orders_raise(order: list[int], by_name: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        capture_calls(Strange(order, by_name), Blocks("layers", 3, "Linear"), {"input_ids": torch.ones(1, 4)})


def test_call_block_wants_a_tensor() -> None:
    calls = capture_calls(Strange([0, 1, 2]), Blocks("layers", 3, "Linear"), {"input_ids": torch.ones(1, 4)})
    assert calls[0].hidden is not None
    with pytest.raises(ModelError, match="Returns returned dict"):
        call_block(type("Returns", (nn.Module,), {"forward": lambda self, h: {}})(), calls[0].hidden, calls[0])
