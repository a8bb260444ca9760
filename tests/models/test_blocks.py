"""Blocks are found by structure alone: in every family, on meta, under wrappers, beside and inside other lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, JambaConfig, T5Config

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import Blocks, block_list, find_blocks

EXPECTED = {
    "bloom": ("transformer.h", "BloomBlock"),
    "gemma": ("model.layers", "GemmaDecoderLayer"),
    "gemma2": ("model.layers", "Gemma2DecoderLayer"),
    "gpt2": ("transformer.h", "GPT2Block"),
    "gpt_neox": ("gpt_neox.layers", "GPTNeoXLayer"),
    "llama": ("model.layers", "LlamaDecoderLayer"),
    "mistral": ("model.layers", "MistralDecoderLayer"),
    "opt": ("model.decoder.layers", "OPTDecoderLayer"),
    "phi": ("model.layers", "PhiDecoderLayer"),
    "qwen2": ("model.layers", "Qwen2DecoderLayer"),
    "qwen3": ("model.layers", "Qwen3DecoderLayer"),
}
Pico = Callable[..., nn.Module]


class Wrapper(nn.Module):
    """Holds a model the way DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class Block(nn.Module):
    """Two linears, optionally with a longer list of experts inside."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList([Block() for _ in range(experts)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(hidden)) + sum(expert(hidden) for expert in self.experts)
        return out


class Net(nn.Module):
    """Walks through ``layers``; ``spare`` is a list of blocks that the forward pass never calls."""

    def __init__(self, depth: int, spare: int = 0, experts: int = 0) -> None:
        super().__init__()
        self.spare = nn.ModuleList([Block() for _ in range(spare)])
        self.embed = nn.Embedding(8, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth + 9)])
        self.layers = nn.ModuleList([Block(experts) for _ in range(depth)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_every_family(family: str, pico: Pico) -> None:
    model = pico(family)
    blocks = find_blocks(model)
    assert blocks == Blocks(EXPECTED[family][0], 6, EXPECTED[family][1])
    assert block_list(model, blocks)[3] is model.get_submodule(f"{blocks.path}.3")
    with torch.device("meta"):
        assert find_blocks(AutoModelForCausalLM.from_config(model.config)) == blocks


def test_under_wrappers(family: str, pico: Pico) -> None:
    # FedBiOT's and FS-OT's block search misses a PEFT model and dies (peers.md, fault 3)
    path, cls = EXPECTED[family]
    assert find_blocks(Wrapper(Wrapper(pico(family)))) == Blocks(f"module.module.{path}", 6, cls)
    wrapped = get_peft_model(pico(family), LoraConfig(r=2, target_modules=r".*\.0\..*(q_proj|c_attn|query_key_value)"))
    assert find_blocks(wrapped) == Blocks(f"base_model.model.{path}", 6, cls)


def test_a_bare_body_and_a_single_block(pico: Pico) -> None:
    model = pico("llama", num_hidden_layers=1)
    assert find_blocks(model) == Blocks("model.layers", 1, "LlamaDecoderLayer")
    assert find_blocks(model.model) == Blocks("layers", 1, "LlamaDecoderLayer")


def test_lists_inside_a_block_and_lists_of_bare_layers_never_win() -> None:
    assert find_blocks(Net(depth=2, experts=8)) == Blocks("layers", 2, "Block")


def test_the_forward_pass_decides_between_lists() -> None:
    model = Net(depth=3, spare=7).train()
    model.embed.eval()
    assert find_blocks(model).path == "layers"
    assert model.training and model.layers[0].training and not model.embed.training
    assert not any(block._forward_pre_hooks for block in [*model.layers, *model.spare])


def test_without_weights_the_longest_list_wins() -> None:
    with torch.device("meta"):
        assert find_blocks(Net(depth=3, spare=2)).path == "layers"


def test_ties_raise_and_list_what_was_seen() -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=r"spare \(3 x Block\).*layers \(3 x Block\)"):
        find_blocks(Net(depth=3, spare=3))


def test_overrides_choose_the_stack_that_writes_text() -> None:
    with torch.device("meta"):
        t5 = AutoModelForSeq2SeqLM.from_config(T5Config(num_layers=3, d_model=16, d_ff=32, vocab_size=64))
        jamba = AutoModelForCausalLM.from_config(
            JambaConfig(num_hidden_layers=8, hidden_size=64, intermediate_size=64, num_experts=2, vocab_size=64)
        )
    assert find_blocks(Wrapper(t5)).path == "module.decoder.block"
    assert find_blocks(jamba) == Blocks("model.layers", 8, "JambaMambaDecoderLayer")


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "no ModuleList at all"),
        (nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2)])}), "heads (1 x Linear)"),
        (nn.ModuleDict({"mixed": nn.ModuleList([Block(), Wrapper(Block())])}), "mixed (1 x Block + 1 x Wrapper)"),
        (nn.ModuleDict({"none": nn.ModuleList()}), "no ModuleList at all"),
    ],
)
def test_no_blocks(model: nn.Module, seen: str) -> None:
    with pytest.raises(ModelError, match="no list of repeated blocks") as caught:
        find_blocks(model)
    assert f"seen: {seen}." in str(caught.value)


def test_block_list_of_another_model() -> None:
    blocks = find_blocks(Net(depth=3))
    with pytest.raises(ModelError, match="holds 2 blocks where 3"):
        block_list(Net(depth=2), blocks)
    with pytest.raises(ModelError, match="has no list of blocks at 'layers'"):
        block_list(nn.Linear(2, 2), blocks)
    with pytest.raises(ModelError, match="has no list of blocks at 'embed'"):
        block_list(Net(depth=3), Blocks("embed", 3, "Block"))


class Chain(nn.Module):
    """Runs its blocks through a Sequential, as timm's vision transformers do; ``stages`` puts them into a list."""

    def __init__(self, depth: int, stages: int = 0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.stages = nn.ModuleList([nn.Sequential(*(Block() for _ in range(3 + i))) for i in range(stages)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks(self.stem(hidden))
        return out


def test_blocks_in_a_sequential_count_where_no_list_does() -> None:
    model = Chain(depth=4)
    assert find_blocks(model) == Blocks("blocks", 4, "Block")
    assert block_list(model, find_blocks(model)) is model.blocks
    model.layers = nn.ModuleList([Block() for _ in range(3)])
    assert find_blocks(model).path == "layers"  # a list that fits comes first, shorter or not


@pytest.mark.parametrize("model", [Chain(depth=1), Chain(depth=0, stages=3)])
def test_one_block_or_the_stages_of_a_pyramid_are_no_sequential_of_blocks(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no list of repeated blocks"):
        find_blocks(model)


def test_sequentials_that_fit_equally_well_are_named() -> None:
    model = Chain(depth=3)
    model.others = nn.Sequential(*(Block() for _ in range(3)))
    with pytest.raises(ModelError, match=r"equally well.*blocks \(3 x Block\), others \(3 x Block\)"):
        find_blocks(model)
