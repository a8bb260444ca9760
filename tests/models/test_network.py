"""The network that a client rebuilds computes what the owner's own blocks compute, in every family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, linear_bias, linear_weight, named_linears
from offsite_fl.models.linears import replace_module as put
from offsite_fl.models.network import (
    NetworkPlan,
    Place,
    adapter_parameters,
    build_network,
    expected_tensors,
    fill_network,
    place_blocks,
    plan_network,
    shared_tensors,
)
from offsite_fl.models.plug import adapter_tensors
from offsite_fl.models.walk import call_block, capture_calls

from .conftest import ENDS, rebuilt, tensors_of

Pico = Callable[..., nn.Module]
Batch = dict[str, torch.Tensor]


def owner_logits(model: nn.Module, run: Sequence[tuple[nn.Module, int]], batch: Batch) -> torch.Tensor:
    """Logits of the full model as if its blocks were those of ``run``: pairs of a block and the place it calls from."""
    blocks = find_blocks(model)
    calls = capture_calls(model, blocks, batch)
    hidden = calls[0].hidden
    assert hidden is not None
    with torch.no_grad():
        for block, origin in run:
            hidden = call_block(block, hidden, calls[origin])
        handle = block_list(model, blocks)[-1].register_forward_hook(
            lambda _, __, output: (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        )
        logits: torch.Tensor = model(**batch).logits  # norm and head run on what the hook hands them
    handle.remove()
    return logits


def verbatim(model: nn.Module, origins: Sequence[int]) -> list[nn.Module]:
    stack = block_list(model, find_blocks(model))
    return [copy.deepcopy(stack[index]) for index in origins]


def compressed(block: nn.Module) -> nn.Module:
    """A copy of ``block`` whose linears are, in turn, quantised, low-rank, low-rank with quantised factors, dense."""
    block = copy.deepcopy(block)
    for number, (path, linear) in enumerate(list(named_linears(block))):
        up, scale, down = torch.linalg.svd(linear_weight(linear).detach(), full_matrices=False)
        if number % 4 == 0:
            put(block, path, QuantizedLinear.from_linear(linear, bits=4, group=32))
        elif number % 4 < 3:
            low_rank = LowRankLinear.from_factors(up[:, :8] * scale[:8], down[:8], linear_bias(linear))
            if number % 4 == 2:
                low_rank.up = QuantizedLinear.from_linear(low_rank.up, bits=8, group=8)
                low_rank.down = QuantizedLinear.from_linear(low_rank.down, bits=4, group=16)
            put(block, path, low_rank)
    return block


def test_split_and_join_change_nothing(family: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    network, _ = rebuilt(model, {1: 0, 2: 1, 3: 2, 4: 3}, verbatim(model, (1, 2, 3, 4)), (1, 2, 3, 4))
    assert type(network) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(network(**pico_batch).logits, model(**pico_batch).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("adapter", "layout", "origins"),
    [
        (ENDS, {2: 0, 3: 1}, (2, 3)),
        ((4, 5), {1: 0, 3: 1}, (1, 3)),  # no adapter in front
        ((0,), {3: 0}, (3,)),  # none at the end
        ((1, 4), {0: 0, 3: 1, 5: 2}, (0, 3, 5)),  # scattered
        (ENDS, {1: 0, 2: 1, 4: 0}, (1, 2)),  # block 0 of the emulator runs twice
        (ENDS, {2: 0, 3: 0, 4: 0}, (1,)),  # one block everywhere, from another place
    ],
)
def test_client_logits_equal_the_owners(
    family: str,
    adapter: tuple[int, ...],
    layout: dict[int, int],
    origins: tuple[int, ...],
    pico: Pico,
    pico_batch: Batch,
) -> None:
    model = pico(family)
    stack, emulator = block_list(model, find_blocks(model)), verbatim(model, origins)
    network, plan = rebuilt(model, layout, emulator, origins, adapter)
    at = {index: (stack[index], index) for index in adapter} | {p: (emulator[b], origins[b]) for p, b in layout.items()}
    expected = owner_logits(model, [at[position] for position in sorted(at)], pico_batch)
    with torch.no_grad():
        torch.testing.assert_close(network(**pico_batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(plan.layout) == len(at) == network.config.num_hidden_layers


def test_compressed_blocks_travel(family: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    stack = block_list(model, find_blocks(model))
    emulator = [compressed(stack[2]), compressed(stack[4])]
    network, _ = rebuilt(model, {2: 0, 4: 1}, emulator, (2, 4))
    run = [(stack[0], 0), (emulator[0], 2), (emulator[1], 4), (stack[5], 5)]
    with torch.no_grad():
        expected = owner_logits(model, run, pico_batch)
        torch.testing.assert_close(network(**pico_batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert any(isinstance(module, QuantizedLinear) for module in network.modules())


def test_block_indices_are_renumbered(family: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    network, plan = rebuilt(model, {2: 0, 4: 0}, verbatim(model, (2,)), (2,))
    for position, block in enumerate(place_blocks(network, plan)):
        indices = {module.layer_idx for module in block.modules() if getattr(module, "layer_idx", None) is not None}
        assert indices <= {position}
    # a key-value cache is indexed by them: generation works and agrees with a run without a cache
    prompt = pico_batch["input_ids"][:1]
    with_cache, without = (
        network.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_per_block_lists_of_the_config_are_cut(pico: Pico) -> None:
    model = pico("gemma2")
    assert model.config.layer_types[0] == model.config.layer_types[4] == "sliding_attention"
    _, plan = rebuilt(model, {2: 0, 4: 1}, verbatim(model, (2, 4)), (2, 4))
    assert plan.config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    assert plan.config["num_hidden_layers"] == 4


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_comes_along(family: str, tied: bool, pico: Pico, pico_batch: Batch) -> None:
    # FATE's client runs a random head because its payload lacks lm_head (peers.md, fault 4)
    model = pico(family, tie_word_embeddings=tied)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) is tied
    network, _ = rebuilt(model, {2: 0}, verbatim(model, (2,)), (2,))
    assert torch.equal(network.get_output_embeddings().weight, head)
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) is tied
    names = shared_tensors(model, find_blocks(model))
    assert sum(value.shape == embedding.shape for value in names.values()) == (1 if tied else 2)


def test_shared_tensors_are_all_outside_the_blocks_once(family: str, pico: Pico) -> None:
    model = pico(family)
    blocks = find_blocks(model)
    shared = shared_tensors(model, blocks)
    adapter = adapter_tensors(model, blocks, range(6))
    assert all(name.startswith("shared.") and blocks.path not in name for name in shared)
    pointers = [value.data_ptr() for value in [*shared.values(), *adapter.values()]]
    assert sorted(pointers) == sorted(parameter.data_ptr() for parameter in model.parameters())


def test_a_slot_at_two_places_is_one_set_of_parameters(pico_llama: nn.Module) -> None:
    network, plan = rebuilt(pico_llama, {1: 0, 2: 1, 4: 0}, verbatim(pico_llama, (1, 2)), (1, 2))
    _, first, other, again, _ = place_blocks(network, plan)
    for name, parameter in first.named_parameters():
        assert again.get_parameter(name) is parameter
        assert other.get_parameter(name) is not parameter
    assert plan.layout == tuple(
        Place(role, slot)  # type: ignore[arg-type]
        for role, slot in [("adapter", 0), ("emulator", 0), ("emulator", 1), ("emulator", 0), ("adapter", 1)]
    )


def test_only_the_adapter_trains(family: str, pico: Pico, pico_batch: Batch) -> None:
    model = pico(family)
    network, plan = rebuilt(model, {2: 0, 3: 1}, verbatim(model, (2, 3)), (2, 3))
    assert not any(module.training for module in network.modules())
    assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    adapter = adapter_parameters(network, plan)
    assert adapter.keys() == adapter_tensors(model, find_blocks(model), ENDS).keys()
    trainable = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter.values()}
    network(**pico_batch).loss.backward()
    assert {id(parameter) for parameter in network.parameters() if parameter.grad is not None} == trainable


def test_expected_tensors_are_what_the_owner_has(family: str, pico: Pico) -> None:
    model = pico(family)
    blocks = find_blocks(model)
    emulator = [compressed(block_list(model, blocks)[2])]
    plan = plan_network(model, blocks, ENDS, {2: 0, 3: 0}, emulator, (2,))
    expected, tensors = expected_tensors(plan), tensors_of(model, blocks, ENDS, emulator)
    assert {name: spec.shape for name, spec in expected.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert all(spec.dtype in (None, tensors[name].dtype) for name, spec in expected.items())
    assert any(spec.dtype is torch.uint8 for spec in expected.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("shared.lm_head.weight"), "missing tensors.*shared.lm_head.weight"),
        (lambda t: t.pop("adapter.1.mlp.up_proj.weight"), "missing tensors.*adapter.1.mlp.up_proj.weight"),
        (lambda t: t.update({"emulator.1.mlp.up_proj.weight": torch.zeros(2)}), "unknown tensors.*emulator.1.mlp"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}), "unknown tensors.*model.layers.0"),
        (lambda t: t.update({"shared.model.norm.weight": torch.zeros(31)}), r"norm.weight' has shape \(31,\).*\(32,\)"),
        (lambda t: t.update({"emulator.0.self_attn.q_proj.packed": torch.zeros(32, 16)}), "packed' has dtype"),
    ],
)
def test_filling_is_strict(spoil: Callable[[Batch], Any], message: str, pico_llama: nn.Module) -> None:
    blocks = find_blocks(pico_llama)
    emulator = [compressed(block_list(pico_llama, blocks)[2])]
    plan = plan_network(pico_llama, blocks, ENDS, {2: 0}, emulator, (2,))
    tensors = tensors_of(pico_llama, blocks, ENDS, emulator)
    spoil(tensors)
    network = build_network(plan)
    with pytest.raises(ModelError, match=message):
        fill_network(network, plan, tensors)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_a_plan_does_not_tell_where_blocks_came_from(pico: Pico) -> None:
    model = pico("llama", num_hidden_layers=23)
    model.config._name_or_path = "/home/owner/secret-model"
    plan = plan_network(model, find_blocks(model), (0, 22), {13: 0, 17: 1}, verbatim(model, (13, 17)), (13, 17))
    text = json.dumps(plan.to_json())
    assert "secret" not in text
    numbers = json.loads(text, parse_int=lambda digits: {"number": digits})
    assert not {"13", "17", "22", "23"} & set(_numbers(numbers))


def _numbers(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [data["number"]] if set(data) == {"number"} else [n for v in data.values() for n in _numbers(v)]
    return [n for v in data for n in _numbers(v)] if isinstance(data, list) else []


def timm_backbone(name: str) -> dict[str, str]:
    return {"model_type": "timm_backbone", "backbone": name}


def test_a_timm_backbone_may_be_part_of_a_plan(pico_llama: nn.Module) -> None:
    plan = plan_network(pico_llama, find_blocks(pico_llama), ENDS, {2: 0}, verbatim(pico_llama, (2,)), (2,)).to_json()
    plan["config"] = {"model_type": "detr", "backbone_config": timm_backbone("resnet50")}
    assert NetworkPlan.from_json(plan).config == plan["config"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.pop("layout"), "exactly the keys"),
        (lambda p: p.update(code="import os"), "exactly the keys"),
        (lambda p: p.update(task="causal"), "unknown task 'causal'; did you mean 'causal-lm'"),
        (lambda p: p.update(blocks_path=3), "blocks_path must be text"),
        (lambda p: p.update(layout=[]), "layout must be a list"),
        (lambda p: p.update(layout=[["adapter", 0]] * 5000), "layout must be a list"),
        (lambda p: p["layout"].__setitem__(1, ["middle", 0]), "isn't a place"),
        (lambda p: p["layout"].__setitem__(1, ["emulator", True]), "isn't a place"),
        (lambda p: p["layout"].__setitem__(0, ["adapter", 1]), "adapter slots must run 0, 1"),
        (lambda p: p["layout"].__setitem__(1, ["emulator", 7]), "1 emulator blocks are described"),
        (lambda p: p["config"].update(auto_map={"AutoConfig": "x.C"}), "may not carry 'auto_map'"),
        (lambda p: p["config"].update(_attn_implementation="owner/kernel"), "may not carry '_attn_implementation'"),
        (lambda p: p["config"].update(architecture="hf-hub:owner/name"), "architecture = 'hf-hub:owner/name' must be"),
        (lambda p: p["config"].update(inner=timm_backbone("../vit")), "inner.backbone = '../vit' must be a plain"),
        (lambda p: p["config"].update(backbone="resnet-50"), "config may not carry 'backbone'"),
        (lambda p: p["config"].update(use_timm_backbone=False), "config may not carry 'use_timm_backbone'"),
        (lambda p: p["config"].update(model_args={"checkpoint_path": "x.pt"}), "may not carry 'checkpoint_path'"),
        (lambda p: p["config"].update(hidden_size=2**50), "absurdly large"),
        (lambda p: p["config"].pop("model_type"), "model_type"),
    ],
)
def test_foreign_plans_are_checked(spoil: Callable[[Any], Any], message: str, pico_llama: nn.Module) -> None:
    plan = plan_network(pico_llama, find_blocks(pico_llama), ENDS, {2: 0}, verbatim(pico_llama, (2,)), (2,))
    data = json.loads(json.dumps(plan.to_json()))
    assert NetworkPlan.from_json(data) == plan
    spoil(data)
    with pytest.raises(ModelError, match=message):
        NetworkPlan.from_json(data)


def harmonized(sizes: dict[str, Any] | None = None, path: str = "", **changes: Any) -> Callable[[Any], Any]:
    """Puts a harmonizer entry with these changes into a plan."""
    entry = {"kind": "harmonizer", "in": 32, "rank": 4, "returns": 0} | (sizes or {}) | changes
    return lambda plan: plan["linears"].__setitem__(0, {path: entry})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p["config"].update(model_type="nonesuch"), "can't build 'nonesuch'"),
        (lambda p: p["config"].update(num_attention_heads=0), "can't build 'llama'"),
        (lambda p: p["config"].update(num_hidden_layers=9), "makes 9 blocks, the layout has 3"),
        (lambda p: p.update(blocks_path="model.nowhere"), "has no 'model.nowhere'"),
        (lambda p: p.update(blocks_path="model.norm"), "isn't a list of blocks"),
        (harmonized(rank=0), "rank = 0 is out of range"),
        (harmonized(rank=2**30), "rank = 1073741824 is out of range"),
        (harmonized(returns=2**30), "returns = 1073741824 is out of range"),
        (harmonized({"in": 64}), "a harmonizer of 64 features, the blocks have 32"),
        (harmonized(kind="Harmonizer"), "unknown kind 'Harmonizer'; did you mean 'harmonizer'"),
        (harmonized(path="mlp"), "'mlp': a harmonizer replaces a whole block"),
    ],
)
def test_plans_that_build_nothing(spoil: Callable[[Any], Any], message: str, pico_llama: nn.Module) -> None:
    plan = plan_network(pico_llama, find_blocks(pico_llama), ENDS, {2: 0}, verbatim(pico_llama, (2,)), (2,))
    data = json.loads(json.dumps(plan.to_json()))
    spoil(data)
    with pytest.raises(ModelError, match=message) as caught:
        build_network(NetworkPlan.from_json(data))
    assert len(str(caught.value)) < 500


def test_models_whose_blocks_know_their_index_are_refused(pico: Pico) -> None:
    model = pico("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        plan_network(model, find_blocks(model), ENDS, {2: 0}, verbatim(model, (2,)), (2,))


def test_buffers_that_a_config_asks_for_are_bounded() -> None:
    # 2**25 positions of rotary tables in each block: no tensor of the bundle, yet gigabytes on the client
    config = AutoConfig.for_model("gptj", n_layer=2, n_embd=32, n_head=2, rotary_dim=8, n_positions=64, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    plan = plan_network(model, find_blocks(model), (0,), {1: 0}, [model.transformer.h[1]], (1,))
    data = json.loads(json.dumps(plan.to_json()))
    build_network(NetworkPlan.from_json(data))
    data["config"]["n_positions"] = 2**25
    with pytest.raises(ModelError, match="bytes of buffers"):
        build_network(NetworkPlan.from_json(data))
