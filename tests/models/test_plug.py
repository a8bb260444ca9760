"""Plug-in changes exactly the adapter's tensors, or nothing and says why (peers.md, faults 1, 2, 3 and 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offsite_fl.errors import UpdateError
from offsite_fl.models.blocks import Blocks, find_blocks
from offsite_fl.models.plug import adapter_tensors, plug_in, swapped_in
from offsite_fl.models.split import Split

ADAPTER = (0, 1, 4, 5)
Pico = Callable[..., nn.Module]
State = dict[str, torch.Tensor]


def snapshot(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: State) -> set[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def new_values(model: nn.Module, blocks: Blocks, adapter: tuple[int, ...] = ADAPTER) -> State:
    return {name: value.detach() + 0.5 for name, value in adapter_tensors(model, blocks, adapter).items()}


@pytest.mark.parametrize("split", [Split(2, 2), Split(0, 2), Split(1, 0), Split(at=(1, 3))], ids=str)
def test_exactly_the_adapter_changes(family: str, split: Split, pico: Pico) -> None:
    model = pico(family)
    blocks, adapter = find_blocks(model), split.resolve(6)
    before, values = snapshot(model), new_values(model, blocks, adapter)
    plug_in(model, blocks, adapter, values)
    # the full names are spelled out here, independently of how slots are counted there
    inside = [name for name, _ in model.get_submodule(f"{blocks.path}.0").named_parameters()]
    expected = {
        f"{blocks.path}.{index}.{name}": f"adapter.{slot}.{name}"
        for slot, index in enumerate(adapter)
        for name in inside
    }
    assert changed(model, before) == set(expected)
    state = model.state_dict()
    assert all(torch.equal(state[full], values[slot]) for full, slot in expected.items())


def test_an_untouched_adapter_changes_nothing(family: str, pico: Pico) -> None:
    model = pico(family)
    blocks, before = find_blocks(model), snapshot(model)
    plug_in(model, blocks, ADAPTER, {n: t.detach().clone() for n, t in adapter_tensors(model, blocks, ADAPTER).items()})
    assert not changed(model, before)


def test_order_does_not_matter(pico: Pico) -> None:
    # FS-OT's plug-in goes by position (peers.md, fault 2)
    straight, shuffled = pico("llama"), pico("llama")
    blocks = find_blocks(straight)
    values = new_values(straight, blocks)
    plug_in(straight, blocks, ADAPTER, values)
    plug_in(shuffled, blocks, (5, 0, 4, 1), dict(reversed(values.items())))
    assert not changed(shuffled, snapshot(straight))


def test_slots_count_in_forward_order_and_are_live(pico_llama: nn.Module) -> None:
    tensors = adapter_tensors(pico_llama, find_blocks(pico_llama), (5, 2))
    layers = pico_llama.get_submodule("model.layers")
    assert tensors["adapter.0.mlp.up_proj.weight"] is layers[2].mlp.up_proj.weight  # type: ignore[index]
    assert tensors["adapter.1.mlp.up_proj.weight"] is layers[5].mlp.up_proj.weight  # type: ignore[index]
    assert len(tensors) == 18


def test_ties_dtype_and_identity_are_kept(pico: Pico) -> None:
    model = pico("gemma").to(torch.bfloat16)
    blocks = find_blocks(model)
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    values = {name: value.double() for name, value in new_values(model, blocks).items()}
    plug_in(model, blocks, ADAPTER, values)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(optimiser.param_groups[0]["params"]) == len(parameters)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


NAME = "adapter.2.self_attn.q_proj.weight"
LAST = "adapter.3.post_attention_layernorm.weight"  # checked after all others: nothing may have been written by then


def without(values: State, name: str) -> None:
    del values[name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # FedBiOT loads by keys of the list, with strict=False, and changes nothing (peers.md, fault 1)
        (lambda v: v.update({"0.self_attn.q_proj.weight": v.pop(NAME)}), f"unknown: 0.self_attn.*missing: {NAME}"),
        (lambda v: v.update({"adapter.4.mlp.up_proj.weight": v[NAME]}), "unknown: adapter.4.mlp.up_proj.weight"),
        (lambda v: without(v, LAST), f"missing: {LAST}"),
        (lambda v: v.clear(), "missing: adapter.0.*and 33 more"),
        (lambda v: v.update({NAME: torch.zeros(31, 32)}), rf"{NAME} has shape \(31, 32\).*\(32, 32\)"),
        (lambda v: v.update({LAST: torch.zeros(1)}), rf"{LAST} has shape \(1,\)"),
        (lambda v: v[LAST].fill_(float("nan")), rf"{LAST} holds 32 value\(s\) that aren't finite, of 32"),
        (lambda v: v[NAME][0].fill_(float("-inf")), f"{NAME} holds 32 value.*of 1024"),
        (lambda v: v.update({LAST: torch.full((32,), 1e300, dtype=torch.float64)}), f"{LAST}.*too large.*float32"),
        (lambda v: v.update({LAST: torch.ones(32, dtype=torch.int64)}), f"{LAST} has dtype torch.int64"),
        (lambda v: v.update({LAST: torch.ones(32, device="meta")}), f"{LAST}.*not a meta tensor"),
        (lambda v: v.update({LAST: [1.0] * 32}), f"{LAST} should be a tensor with values, not list"),
    ],
)
def test_a_bad_update_changes_nothing(spoil: Callable[[Any], Any], message: str, pico_llama: nn.Module) -> None:
    blocks, before = find_blocks(pico_llama), snapshot(pico_llama)
    values = new_values(pico_llama, blocks)
    spoil(values)
    for write in (plug_in, lambda *args: swapped_in(*args).__enter__()):
        with pytest.raises(UpdateError, match=message):
            write(pico_llama, blocks, ADAPTER, values)
        assert not changed(pico_llama, before)


def test_swapped_in_restores_bit_for_bit(pico_llama: nn.Module, pico_batch: State) -> None:
    blocks, before = find_blocks(pico_llama), snapshot(pico_llama)
    values = new_values(pico_llama, blocks)
    with pytest.raises(KeyError), swapped_in(pico_llama, blocks, ADAPTER, values):
        assert len(changed(pico_llama, before)) == 36
        raise KeyError("whatever happens inside")
    assert not changed(pico_llama, before)


def test_values_are_copied_not_kept(pico_llama: nn.Module) -> None:
    blocks = find_blocks(pico_llama)
    values = new_values(pico_llama, blocks)
    plug_in(pico_llama, blocks, ADAPTER, values)
    after = snapshot(pico_llama)
    for value in values.values():
        value.zero_()
    assert not changed(pico_llama, after)
