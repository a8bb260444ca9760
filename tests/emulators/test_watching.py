"""Blocks watched on noise: attention and what blocks return, in every family, without any text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from offsite_fl.emulators import parse_emulator, start
from offsite_fl.emulators.base import Context, copy_structure
from offsite_fl.emulators.watching import Watcher
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, linear_weight, named_linears, replace_module
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.models.families import built, processor_of
from tests.models.other_families import OTHERS

MakeContext = Callable[..., Context]
# By their names, read off the sources of transformers.
ATTENTION = {
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "opt": {f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")},
    "bloom": {"self_attention.query_key_value", "self_attention.dense"},
    "gpt_neox": {"attention.query_key_value", "attention.dense"},
    "phi": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"},
}
LLAMA = {f"self_attn.{n}_proj" for n in "qkvo"}


@pytest.mark.parametrize("position", [0, 3])
def test_the_attention_of_every_family(
    family: str, position: int, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family), calibration=())
    watcher = Watcher(context)
    seen = watcher.watch(copy_structure(context.block(position)).eval(), position)
    assert set(seen.attention) == ATTENTION.get(family, LLAMA)
    assert watcher.returns(context.block(position), position) == (2 if family == "bloom" else 0)
    assert watcher.noise.shape[-1] == 32


def test_attention_with_equal_heads_is_no_chain_of_channels(
    pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """With as many outputs of q, k and v only different tokens tell attention from an MLP."""
    context = context_of(pico("llama", num_key_value_heads=4), calibration=())
    assert set(Watcher(context).watch(context.block(3), 3).attention) == LLAMA


def test_blocks_of_one_kind_are_looked_at_once(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """A block in which something was replaced is of another kind."""
    context = context_of(pico_llama)
    watcher = Watcher(context)
    whole = watcher.watch(context.block(1), 1)
    assert watcher.watch(context.block(2), 2) is whole
    block = copy_structure(context.block(3))
    replace_module(block, "self_attn.q_proj", LowRankLinear(32, 32, 4, bias=False))
    assert set(watcher.watch(block, 3).attention) == LLAMA - {"self_attn.q_proj"}


def test_without_dense_linears_there_is_nothing_to_see(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    block = copy_structure(context.block(2))
    for path, linear in list(named_linears(block)):
        assert linear_weight(linear).ndim == 2
        replace_module(block, path, QuantizedLinear.from_linear(linear, 8, 16))
    seen = Watcher(context).watch(block, 2)
    assert seen.attention == () and seen.chains == ()


@pytest.mark.parametrize("name", ["clip", "siglip2", "whisper"])
def test_a_model_that_takes_another_batch_is_refused_in_words(name: str) -> None:
    """CLIP wants an image too and SigLIP 2 the shape of its patches; Whisper's decoder reads a longer sequence."""
    owner = ModelOwner(built(OTHERS[name]), processor_of(OTHERS[name]), Split(first=1, last=1))
    context = owner.context()
    with pytest.raises(EmulatorError, match=r"can't be watched.*Take an emulator that needn't watch, like low-rank"):
        parse_emulator("prune:keep=0.5").compress(start(context), context)
