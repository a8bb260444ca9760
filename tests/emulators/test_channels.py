"""MLP channels, found by watching: names that are expected are written down here and nowhere in the sources."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, copy_structure
from offsite_fl.emulators.channels import ChannelChain, find_chains, keep_channels
from offsite_fl.emulators.groups import plan_block
from offsite_fl.emulators.streams import Stream, read_batches
from offsite_fl.models.linears import linear_weight
from offsite_fl.models.walk import BlockCall, call_block

MakeContext = Callable[..., Context]
GATED = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
EXPECTED = {
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "opt": (("fc1",), "fc2"),
    "bloom": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "gpt_neox": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "phi": (("mlp.fc1",), "mlp.fc2"),
}


def chains_of(context: Context, position: int = 2) -> tuple[nn.Module, Tensor, BlockCall, tuple[ChannelChain, ...]]:
    stream = Stream.entering(read_batches(context, context.calibration))
    block, batch, hidden = copy_structure(context.block(position)), stream.batches[0], stream.hidden[0]
    call = batch.calls[position]
    return block, hidden, call, find_chains(block, hidden, call, plan_block(block, hidden, call, batch.rows))


def test_one_chain_in_every_family(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    block, _, _, chains = chains_of(context_of(pico(family)))
    readers, writer = EXPECTED.get(family, GATED)
    width = linear_weight(block.get_submodule(writer)).shape[1]
    assert chains == (ChannelChain(readers, writer, width),)
    assert chains[0].paths == (*readers, writer)


def test_a_fused_gate_and_up_counts_as_two_parts(pico_phi3: nn.Module, context_of: MakeContext) -> None:
    block, hidden, call, chains = chains_of(context_of(pico_phi3))
    assert chains == (ChannelChain(("mlp.gate_up_proj",), "mlp.down_proj", 48, 2),)
    before = call_block(block, hidden, call)
    keep_channels(block, chains[0], torch.randperm(48))
    assert_close(call_block(block, hidden, call), before)


def test_another_order_of_all_channels_changes_nothing(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    block, hidden, call, chains = chains_of(context)
    weights = {name: value.clone() for name, value in context.block(2).state_dict().items()}
    before = call_block(block, hidden, call)
    keep_channels(block, chains[0], torch.randperm(chains[0].width, generator=torch.Generator().manual_seed(3)))
    assert_close(call_block(block, hidden, call), before)
    assert all(torch.equal(value, weights[name]) for name, value in context.block(2).state_dict().items())


def test_channels_taken_out_are_channels_set_to_zero(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    block, hidden, call, (chain,) = chains_of(context_of(pico(family)))
    kept = torch.arange(chain.width)[::3]
    reference = copy_structure(block)
    writer = reference.get_submodule(chain.writer)
    masked = linear_weight(writer).detach().clone()
    masked[:, [c for c in range(chain.width) if c % 3]] = 0
    with torch.no_grad():
        writer.weight = nn.Parameter(masked if isinstance(writer, nn.Linear) else masked.T)
    keep_channels(block, chain, kept)
    assert linear_weight(block.get_submodule(chain.writer)).shape[1] == len(kept)
    assert_close(call_block(block, hidden, call), call_block(reference, hidden, call))


class OneHead(nn.Module):
    """Attention of one head without positions: its channels can be permuted too, but its tokens can't."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(
            self.q(hidden), self.k(hidden), self.v(hidden), is_causal=True
        )
        update: Tensor = self.out(attended)
        return hidden + update


def test_attention_is_no_chain() -> None:
    torch.manual_seed(0)
    block, hidden, call = OneHead().eval(), torch.randn(2, 6, 8), BlockCall()
    plan = plan_block(block, hidden, call, lambda x: x.reshape(-1, x.shape[-1]))
    assert plan.groups == (("q", "k", "v"), ("out",))
    assert find_chains(block, hidden, call, plan) == ()


class Parallel(nn.Module):
    """Attention beside an MLP that reads the same tensor, with a query exactly as wide as the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(8, 16) for _ in range(4))
        self.out, self.down = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (m(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        update: Tensor = self.out(attended) + self.down(self.up(hidden).relu())
        return hidden + update


def test_a_linear_that_is_as_wide_by_chance_is_left_out() -> None:
    torch.manual_seed(0)
    block, hidden, call = Parallel().eval(), torch.randn(2, 6, 8), BlockCall()
    plan = plan_block(block, hidden, call, lambda x: x.reshape(-1, x.shape[-1]))
    assert plan.groups[0] == ("q", "k", "v", "up")
    assert find_chains(block, hidden, call, plan) == (ChannelChain(("up",), "down", 16),)


def test_dtype_and_mode_stay(pico_llama: nn.Module, context_of: MakeContext) -> None:
    block, _, _, (chain,) = chains_of(context_of(pico_llama.bfloat16()))
    keep_channels(block, chain, torch.arange(5))
    new = block.get_submodule(chain.writer)
    assert new.weight.dtype == torch.bfloat16 and not new.training and not new.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_found_too(dtype: torch.dtype, pico_llama: nn.Module, context_of: MakeContext) -> None:
    assert len(chains_of(context_of(pico_llama.to(dtype)))[3]) == 1
