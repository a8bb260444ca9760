"""A network's blocks are compared with the owner's by class, shape and setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.likeness import check_alike

ALL = tuple(range(6))


def check(model: nn.Module, change: Callable[[Any], None] | None = None, sources: tuple[int, ...] = ALL) -> None:
    network: Any = copy.deepcopy(model)
    layers = network.model.layers
    network.model.layers = nn.ModuleList([layers[source] for source in sources])
    for place, block in enumerate(network.model.layers):
        block.self_attn.layer_idx = place
    if change is not None:
        change(network)
    check_alike(model, find_blocks(model), network, sources)


def test_copies_are_alike_whatever_their_index(pico_llama: nn.Module) -> None:
    check(pico_llama)
    check(pico_llama, sources=(0, 2, 5))
    check(pico_llama, lambda network: network.to("meta").train())


def test_dropout_and_checkpointing_do_not_count(pico_llama: nn.Module) -> None:
    def change(network: Any) -> None:
        network.model.layers[1].self_attn.attention_dropout = 0.3
        network.model.layers[1].dropout = nn.Dropout(0.5)
        network.model.layers[2].gradient_checkpointing = True

    check(pico_llama, change)


def widened(network: Any) -> None:
    network.model.layers[1].mlp.up_proj = nn.Linear(32, 65, bias=False)


def without_bias(network: Any) -> None:
    network.model.layers[1].mlp.up_proj = nn.Linear(32, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widened, r"mlp.up_proj.weight has shape \(64, 32\) here and \(65, 32\) there"),
        (without_bias, r"mlp.up_proj.bias has shape none here and \(64,\) there"),
        (lambda n: setattr(n.model.layers[1].self_attn, "scaling", 2.0), "self_attn.scaling = .* here and 2.0 there"),
        (lambda n: setattr(n.model.layers[1], "mlp", nn.Identity()), "mlp is LlamaMLP here and Identity there"),
        (lambda n: setattr(n, "lm_head", nn.Linear(32, 9)), r"doesn't describe this Llama.*lm_head.weight.*\(9, 32\)"),
    ],
)
def test_differences_are_named(change: Callable[[Any], None], message: str, pico_llama: nn.Module) -> None:
    with pytest.raises(ModelError, match=message):
        check(pico_llama, change)


def test_a_block_at_another_place_gets_another_sentence(pico_llama: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"block 2 .* as block 1 .*depends on its index.*first=2 does with any"):
        check(pico_llama, widened, sources=(0, 2, 5))
    with pytest.raises(ModelError, match=r"block 1 .* as block 1 .*the config makes another block there"):
        check(pico_llama, widened)


def test_another_class(pico_llama: nn.Module) -> None:
    blocks = find_blocks(pico_llama)
    with pytest.raises(ModelError, match="would build Linear from the config where the owner has LlamaForCausalLM"):
        check_alike(pico_llama, blocks, nn.Linear(2, 2), (0,))
    assert torch.is_grad_enabled()
