"""Dims of values inside heads: which linear writes them is written down here, and moving them changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Context, start
from offsite_fl.emulators.channels import ChannelChain, find_chains
from offsite_fl.emulators.free_order import find_free
from offsite_fl.emulators.groups import plan_block
from offsite_fl.emulators.heads import find_heads
from offsite_fl.emulators.value_dims import ValueDims, find_values
from offsite_fl.models.walk import BlockCall
from tests.emulators.test_heads import WITHOUT, WRITERS, Attention, Block, neighbours
from tests.pico_classifiers import make_classifier

MakeContext = Callable[..., Context]


def values_of(model: nn.Module, context_of: MakeContext, adapter: tuple[int, ...] = (0, 5)) -> list[ValueDims]:
    context = context_of(model, adapter, calibration=())
    (free,) = set(find_free(start(context), context).values())
    return [part for part in free if isinstance(part, ValueDims)]


def test_families(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Two key-value heads of 8 dims, each read by two query heads; none where heads aren't found at all."""
    expected = ValueDims("self_attn.v_proj", WRITERS.get(family, "self_attn.o_proj"), heads=2, size=8, copies=2)
    assert values_of(pico(family), context_of) == ([] if family in WITHOUT else [expected])


def test_without_groups(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Queries, keys and values of one shape: only the values' dims come out as they were written."""
    found = values_of(pico("llama", num_key_value_heads=4), context_of)
    assert found == [ValueDims("self_attn.v_proj", "self_attn.o_proj", heads=4, size=8)]


def test_a_vision_model(context_of: MakeContext) -> None:
    found = values_of(make_classifier("vit"), context_of, (0, 4))
    assert found == [ValueDims("attention.v_proj", "attention.o_proj", heads=2, size=8)]


def test_not_asked_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    found = find_free(start(context), context, values=False)
    assert [[type(part) for part in parts] for parts in found.values()] == [[ChannelChain]] * 4


def test_rows_and_columns_by_hand() -> None:
    """Heads of 3 dims in orders 2 0 1 and 0 2 1; two query heads on each."""
    values, order = ValueDims("v", "o", heads=2, size=3, copies=2), torch.tensor([[2, 0, 1], [0, 2, 1]])
    assert values.rows(order).tolist() == [2, 0, 1, 3, 5, 4]
    assert values.columns(order).tolist() == [2, 0, 1, 5, 3, 4, 6, 8, 7, 9, 11, 10]


class Scaled(Attention):
    """Each dim of what the heads return has a factor of its own, so that dims can't change places."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__(neighbours, head_dim=4)
        self.mixed, self.out = self.out, nn.Sequential()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        read = super().forward(x)
        out: Tensor = self.mixed(read * self.factors.repeat(read.shape[-1] // 4))
        return out


@pytest.mark.parametrize(("factors", "free"), [([1.0, 1.0, 1.0, 1.0], True), ([1.0, 2.0, 1.0, 0.5], False)])
def test_dims_that_are_not_alike_stay(factors: list[float], free: bool) -> None:
    torch.manual_seed(0)
    block, call = Block(Scaled(torch.tensor(factors))).eval(), BlockCall()
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    plan = plan_block(block, hidden, call, lambda x: x.reshape(-1, x.shape[-1]))
    heads = find_heads(block, hidden, call, plan, find_chains(block, hidden, call, plan))
    assert len(heads) == 1
    expected = (ValueDims("inner.value", "inner.mixed", heads=2, size=4, copies=2),) if free else ()
    assert find_values(block, hidden, call, heads) == expected


def test_dims_that_are_all_equal_prove_nothing() -> None:
    torch.manual_seed(0)
    attention = Attention(neighbours, head_dim=4)
    block, call = Block(attention).eval(), BlockCall()
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    plan = plan_block(block, hidden, call, lambda x: x.reshape(-1, x.shape[-1]))
    heads = find_heads(block, hidden, call, plan, ())
    assert len(find_values(block, hidden, call, heads)) == 1
    with torch.no_grad():
        attention.value.weight.view(2, 4, 16).copy_(attention.value.weight.view(2, 4, 16)[:, :1].expand(2, 4, 16))
        attention.value.bias.zero_()
    assert find_values(block, hidden, call, heads) == ()
