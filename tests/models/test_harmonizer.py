"""A harmonizer: what it computes, that it starts as identity, and that a model runs with one in place of a block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import (
    LowRankLinear,
    QuantizedLinear,
    apply_linears,
    describe_linears,
    linear_weight,
    named_linears,
    replace_module,
)
from offsite_fl.models.network import expected_tensors, place_blocks
from offsite_fl.models.walk import call_block, capture_calls

from .conftest import rebuilt

Pico = Callable[..., nn.Module]
Batch = dict[str, torch.Tensor]


def returned_by(model: nn.Module, batch: Batch) -> int:
    """How many items the model's blocks return as a tuple; 0 for a bare state."""
    blocks = find_blocks(model)
    call = capture_calls(model, blocks, batch)[0]
    output = block_list(model, blocks)[0](call.hidden, *call.args, **call.kwargs)
    return len(output) if isinstance(output, tuple) else 0


def random_harmonizer(model: nn.Module, index: int, batch: Batch, rank: int = 4) -> Harmonizer:
    block = block_list(model, find_blocks(model))[index]
    new = Harmonizer.replacing(block, 32, rank, returned_by(model, batch))
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return new.requires_grad_(False)


def test_by_hand() -> None:
    """x = (1, -2), Down = [[1, 1], [2, 0]] with bias (0.5, -1): (-0.5, 1), ReLU (0, 1); Up takes its second column."""
    module = Harmonizer(2, 2)
    with torch.no_grad():
        module.down.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))  # type: ignore[operator]
        module.down.bias.copy_(torch.tensor([0.5, -1.0]))  # type: ignore[operator]
        module.up.weight.copy_(torch.tensor([[9.0, 3.0], [9.0, 4.0]]))  # type: ignore[operator]
        module.up.bias.copy_(torch.tensor([0.0, 0.25]))  # type: ignore[operator]
        out = module(torch.tensor([[[1.0, -2.0]]]))
    assert out.tolist() == [[[1.0 + 3.0, -2.0 + 4.0 + 0.25]]]


def test_it_starts_as_identity() -> None:
    x = torch.randn(2, 3, 8)
    assert torch.equal(Harmonizer(8, 4)(x), x)
    state, *rest = Harmonizer(8, 4, returns=2)(x, None, attention_mask=x)
    assert torch.equal(state, x) and rest == [None]
    assert torch.equal(Harmonizer(8, 4)(hidden_states=x), x)


def test_the_stream_keeps_its_dtype() -> None:
    module = Harmonizer(8, 4).to(torch.bfloat16)
    assert module(torch.randn(1, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert Harmonizer(8, 4)(torch.randn(1, 2, 8)).dtype == torch.float32


def test_plain_attributes_of_the_block_are_kept(pico: Pico) -> None:
    block = block_list(pico("llama"), find_blocks(pico("llama")))[3]
    block.attention_type, block.window, block.rank, block._secret = "sliding_attention", 4, 99, 1  # type: ignore[assignment]
    block.table = {"not": "plain"}  # type: ignore[assignment]
    new = Harmonizer.replacing(block, 32, 4)
    assert (new.attention_type, new.window, new.rank, new.layer_idx) == ("sliding_attention", 4, 4, 3)
    assert not hasattr(new, "_secret") and not hasattr(new, "table") and not new.training


def test_the_model_runs_as_if_walked_by_hand(family: str, pico: Pico, pico_batch: Batch) -> None:
    """Adapter 0, harmonizers from blocks 1 and 4, block 3 as it is, adapter 5: states walked block by block."""
    model = pico(family)
    blocks = find_blocks(model)
    stack = block_list(model, blocks)
    ones = [random_harmonizer(model, 1, pico_batch), copy.deepcopy(stack[3]), random_harmonizer(model, 4, pico_batch)]
    network, plan = rebuilt(model, {1: 0, 3: 1, 4: 2}, ones, [1, 3, 4])
    assert plan.linears[0][""] == {"kind": "harmonizer", "in": 32, "rank": 4, "returns": returned_by(model, pico_batch)}
    calls = capture_calls(model, blocks, pico_batch)
    state = calls[0].hidden
    assert state is not None
    with torch.no_grad():
        for block, position in ((stack[0], 0), (ones[0], 1), (ones[1], 3), (ones[2], 4), (stack[5], 5)):
            state = call_block(block, state, calls[position])
        seen: list[torch.Tensor] = []
        place_blocks(network, plan)[-1].register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        logits = network(**pico_batch).logits
    assert_close(seen[0], state, rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(logits).all())


def test_generating_with_a_cache_agrees_with_none(family: str, pico: Pico, pico_batch: Batch) -> None:
    """Also where the first block, off which BLOOM reads how long the text is, and all sliding ones are harmonizers."""
    model = pico(family)
    ones: list[nn.Module] = [random_harmonizer(model, index, pico_batch) for index in (0, 2, 3)]
    network: Any = rebuilt(model, {0: 0, 2: 1, 3: 2}, ones, [0, 2, 3], (1, 4, 5))[0]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompt = pico_batch["input_ids"][:1]
    with_cache, without = (
        torch.cat(network.generate(prompt, use_cache=use, **options).logits) for use in (True, False)
    )
    assert_close(with_cache, without, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapter_through_it(pico_llama: nn.Module, pico_batch: Batch) -> None:
    one = random_harmonizer(pico_llama, 2, pico_batch)
    network, _ = rebuilt(pico_llama, {2: 0}, [one], [2])
    network(**pico_batch).loss.backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert trained == {n for n, _ in network.named_parameters() if n.startswith(("model.layers.0.", "model.layers.2."))}


@pytest.mark.parametrize("replaced", ["quantized", "low-rank", "plain"])
def test_description_and_rebuilding(replaced: str, pico_llama: nn.Module, pico_batch: Batch) -> None:
    block, reference = random_harmonizer(pico_llama, 2, pico_batch, rank=8), pico_llama.model.layers[2]  # type: ignore
    if replaced == "quantized":
        for path, linear in list(named_linears(block)):
            replace_module(block, path, QuantizedLinear.from_linear(linear, 4, 8))
    elif replaced == "low-rank":
        up, scale, down = torch.linalg.svd(linear_weight(block.down), full_matrices=False)
        block.down = LowRankLinear.from_factors(up[:, :2] * scale[:2], down[:2], block.down.bias)  # type: ignore
    table = describe_linears(block, reference)
    assert next(iter(table)) == ""
    assert {path: entry["kind"] for path, entry in table.items() if path} == {
        "quantized": {"down": "quantized", "up": "quantized"},
        "low-rank": {"down": "low-rank"},
        "plain": {},
    }[replaced]
    fresh = copy.deepcopy(reference).to("meta")
    made = apply_linears(fresh, dict(reversed(table.items())), width=32)
    assert isinstance(made, Harmonizer) and all(tensor.is_meta for tensor in made.state_dict().values())
    made.load_state_dict(block.state_dict(), strict=True, assign=True)
    x = torch.randn(1, 3, 32)
    assert torch.equal(made(x), block(x))
    assert describe_linears(made, reference) == table


def test_a_shared_harmonizer_is_one_set_of_parameters(pico_llama: nn.Module, pico_batch: Batch) -> None:
    one = random_harmonizer(pico_llama, 2, pico_batch)
    network, plan = rebuilt(pico_llama, {1: 0, 4: 0}, [one], [2])
    first, second = network.model.layers[1], network.model.layers[2]  # type: ignore[union-attr,index]
    assert first.down.weight is second.down.weight
    assert (first.layer_idx, second.layer_idx) == (1, 2)
    assert sorted(name for name in expected_tensors(plan) if name.startswith("emulator.")) == [
        "emulator.0.down.bias",
        "emulator.0.down.weight",
        "emulator.0.up.bias",
        "emulator.0.up.weight",
    ]
