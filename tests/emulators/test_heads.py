"""Attention heads that can go: who has them is written down here, and taking them out is setting columns to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, copy_structure
from offsite_fl.emulators.channels import find_chains
from offsite_fl.emulators.groups import plan_block
from offsite_fl.emulators.heads import HeadGroups, find_heads, keep_heads
from offsite_fl.emulators.streams import read_batches
from offsite_fl.models.linears import linear_weight
from offsite_fl.models.walk import BlockCall, call_block

MakeContext = Callable[..., Context]
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
WRITERS = {"phi": "self_attn.dense"}
# fused projections (gpt2, bloom, gpt_neox) or a number of heads that the code takes from the config (opt)
WITHOUT = ("gpt2", "bloom", "gpt_neox", "opt")


def heads_of(context: Context, position: int = 2) -> tuple[nn.Module, Tensor, BlockCall, tuple[HeadGroups, ...]]:
    batch = read_batches(context, context.calibration)[0]
    block, hidden, call = copy_structure(context.block(position)).eval(), batch.entry, batch.calls[position]
    plan = plan_block(block, hidden, call, batch.rows)
    return block, hidden, call, find_heads(block, hidden, call, plan, find_chains(block, hidden, call, plan))


def test_families(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Four query heads; two of keys and values where the config can say so."""
    _, _, _, found = heads_of(context_of(pico(family)))
    expected = HeadGroups(PROJECTIONS, WRITERS.get(family, "self_attn.o_proj"), 2)
    assert found == (() if family in WITHOUT else (expected,))


@pytest.mark.parametrize(("key_value_heads", "count"), [(4, 4), (1, None)])
def test_ordinary_and_multi_query_attention(
    key_value_heads: int, count: int | None, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """With one key-value head there is nothing that could go."""
    _, _, _, found = heads_of(context_of(pico("llama", num_key_value_heads=key_value_heads)))
    assert [heads.count for heads in found] == ([] if count is None else [count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_found_too(dtype: torch.dtype, pico_llama: nn.Module, context_of: MakeContext) -> None:
    assert [heads.count for heads in heads_of(context_of(pico_llama.to(dtype)))[3]] == [2]


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi"])
def test_heads_taken_out_are_columns_set_to_zero(
    family: str, group: int, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """Two query heads of 8 features a group: 16 columns of the writer, 16 rows of queries, 8 of keys and values."""
    context = context_of(pico(family))
    block, hidden, call, (heads,) = heads_of(context)
    before = {name: value.clone() for name, value in context.block(2).state_dict().items()}
    reference = copy_structure(block)
    writer = reference.get_submodule(heads.writer)
    masked = linear_weight(writer).detach().clone()
    masked[:, 16 * (1 - group) : 16 * (2 - group)] = 0
    writer.weight = nn.Parameter(masked)
    keep_heads(block, heads, torch.tensor([group]))
    assert_close(call_block(block, hidden, call), call_block(reference, hidden, call))
    assert [linear_weight(block.get_submodule(path)).shape[0] for path in heads.readers] == [16, 8, 8]
    assert linear_weight(block.get_submodule(heads.writer)).shape == (32, 16)
    for path in heads.readers:
        rows = 16 if path.endswith("q_proj") else 8
        for name, tensor in block.get_submodule(path).state_dict().items():
            own = before[f"{path}.{name}"]
            assert torch.equal(tensor, own[rows * group : rows * (group + 1)])
    assert all(torch.equal(value, before[name]) for name, value in context.block(2).state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in context.model.modules())


def test_some_of_four_groups(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    block, hidden, call, (heads,) = heads_of(context_of(pico("llama", num_key_value_heads=4)))
    reference = copy_structure(block)
    writer = reference.get_submodule(heads.writer)
    masked = linear_weight(writer).detach().clone()
    masked[:, [*range(8), *range(16, 24)]] = 0
    writer.weight = nn.Parameter(masked)
    keep_heads(block, heads, torch.tensor([1, 3]))
    assert_close(call_block(block, hidden, call), call_block(reference, hidden, call))


class Config:
    """What transformers' configs tell about heads."""

    hidden_size, num_attention_heads = 16, 4


class Attention(nn.Module):
    """Four query heads on two of keys and values; ``repeat`` says which query heads read which."""

    def __init__(self, repeat: Callable[[Tensor, int], Tensor], **told: Any) -> None:
        super().__init__()
        self.repeat = repeat
        for name, value in told.items():
            setattr(self, name, value)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (m(x).view(rows, tokens, -1, 4).transpose(1, 2) for m in (self.query, self.key, self.value))
        times = q.shape[1] // k.shape[1]
        mixed = nn.functional.scaled_dot_product_attention(q, self.repeat(k, times), self.repeat(v, times))
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, tokens, -1))
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, hidden: Tensor) -> Tensor:
        update: Tensor = self.inner(hidden)
        return hidden + update


def neighbours(x: Tensor, times: int) -> Tensor:
    """Query heads 0 and 1 read head 0, 2 and 3 head 1."""
    return x.repeat_interleave(times, dim=1)


def in_turn(x: Tensor, times: int) -> Tensor:
    """Query heads 0 and 2 read head 0, 1 and 3 head 1."""
    return x.repeat(1, times, 1, 1)


def found_in(attention: nn.Module) -> tuple[HeadGroups, ...]:
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    block, call = Block(attention).eval(), BlockCall()
    plan = plan_block(block, hidden, call, lambda x: x.reshape(-1, x.shape[-1]))
    return find_heads(block, hidden, call, plan, find_chains(block, hidden, call, plan))


@pytest.mark.parametrize("told", [{"head_dim": 4}, {"config": Config()}])
def test_the_size_of_a_head_is_told_by_the_module_or_its_config(told: dict[str, Any]) -> None:
    torch.manual_seed(0)
    expected = HeadGroups(("inner.query", "inner.key", "inner.value"), "inner.out", 2)
    assert found_in(Attention(neighbours, **told)) == (expected,)


def test_what_nobody_tells_is_not_guessed() -> None:
    torch.manual_seed(0)
    assert found_in(Attention(neighbours)) == ()


def test_groups_that_are_not_neighbours_stay() -> None:
    """It runs without the first run of rows, but the heads that stay would read other keys."""
    torch.manual_seed(0)
    assert found_in(Attention(in_turn, head_dim=4)) == ()


def test_a_wrong_size_of_a_head_is_noticed() -> None:
    torch.manual_seed(0)
    assert found_in(Attention(neighbours, head_dim=2)) == ()
