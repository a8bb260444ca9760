"""The cut of attention and nothing else to a share of its rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, copy_structure
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.emulators.rank_share import cut_to_rank, rank_at, saved_bytes
from offsite_fl.emulators.watching import Watcher
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, linear_weight, replace_module

MakeContext = Callable[..., Context]


def test_ranks_by_hand() -> None:
    """0.2 of 32 is 6.4, of 16 it is 3.2; at 0.5 a square matrix saves nothing, 16 x 32 still does: 8 * 48 < 512."""
    assert (rank_at(0.2, 32, 32), rank_at(0.2, 16, 32)) == (6, 3)
    assert (rank_at(0.5, 32, 32), rank_at(0.5, 16, 32)) == (None, 8)
    assert (rank_at(0.49, 32, 32), rank_at(1.0, 16, 32), rank_at(0.01, 32, 32)) == (15, None, 1)


def test_the_cut_is_the_truncated_svd_of_attention_alone(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    original = context.block(2)
    block = copy_structure(original)
    paths = Watcher(context).watch(context.block(2), 2).attention
    expected = stored_bytes([block]) - saved_bytes(block, paths, 0.2)
    cut_to_rank(block, paths, 0.2)
    # q and o are 32 x 32 at rank 6, k and v 16 x 32 at rank 3, in fp32
    assert stored_bytes([block]) == expected == stored_bytes([original]) - 4 * (2 * (1024 - 384) + 2 * (512 - 144))
    for path, rank in (("q_proj", 6), ("k_proj", 3), ("v_proj", 3), ("o_proj", 6)):
        new = block.get_submodule(f"self_attn.{path}")
        assert isinstance(new, LowRankLinear) and new.rank == rank
        u, s, vt = torch.linalg.svd(linear_weight(original.get_submodule(f"self_attn.{path}")).detach().double())
        product = linear_weight(new.up).double() @ linear_weight(new.down).double()
        assert_close(product, u[:, :rank] * s[:rank] @ vt[:rank], rtol=1e-4, atol=1e-5)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert block.get_submodule(f"mlp.{name}").weight is original.get_submodule(f"mlp.{name}").weight


def test_biases_stay(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    context = context_of(pico("gpt2"))
    block = copy_structure(context.block(2))
    cut_to_rank(block, Watcher(context).watch(context.block(2), 2).attention, 0.2)
    for path in ("attn.c_attn", "attn.c_proj"):
        new, old = block.get_submodule(path), context.block(2).get_submodule(path)
        assert isinstance(new, LowRankLinear) and torch.equal(new.up.bias, old.bias)  # type: ignore[arg-type]


def test_what_was_replaced_before_stays(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    block = copy_structure(context.block(2))
    packed = QuantizedLinear.from_linear(block.get_submodule("self_attn.q_proj"), 8, 16)
    factors = LowRankLinear(32, 32, 12, bias=False)
    replace_module(block, "self_attn.q_proj", packed)
    replace_module(block, "self_attn.o_proj", factors)
    held, saved = stored_bytes([block]), saved_bytes(block, Watcher(context).watch(context.block(2), 2).attention, 0.2)
    cut_to_rank(block, Watcher(context).watch(context.block(2), 2).attention, 0.2)
    assert block.get_submodule("self_attn.q_proj") is packed and block.get_submodule("self_attn.o_proj") is factors
    assert stored_bytes([block]) == held - saved == held - 4 * 2 * (512 - 144)
