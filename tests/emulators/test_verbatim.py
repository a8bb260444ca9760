"""How much leaves verbatim: single rows, columns and entries, each of the owner's once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offsite_fl.emulators.align import Align
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock
from offsite_fl.emulators.gradot import GradOT
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.prune import Prune
from offsite_fl.emulators.quantize import Quantize
from offsite_fl.emulators.verbatim import leaves_verbatim, verbatim_share
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, is_linear, linear_weight

from .conftest import compressed

MakeContext = Callable[..., Context]
Pico = Callable[..., nn.Module]


def of_middle(emulator: Emulator, context: Context) -> float:
    """Parameters of the middle that leave, from the share; everything else always does."""
    total = sum(p.numel() for p in context.model.parameters())
    middle = sum(p.numel() for index in context.middle for p in context.block(index).parameters())
    return verbatim_share(emulator, context) * total - (total - middle)


def numbers(emulator: Emulator, least: int = 1, most: int = 9) -> int:
    """Parameters of an emulator's tensors of ``least`` to ``most`` dimensions."""
    tensors = [p for block in emulator.blocks for p in block.module.parameters()]
    return sum(p.numel() for p in tensors if least <= p.dim() <= most)


# One tensor


OWN = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0], [7.0, 0.0, 9.0]])


def found(own: Tensor, sent: Tensor) -> list[list[int]]:
    rows: list[list[int]] = leaves_verbatim(own, sent).int().tolist()
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entries_in_place(dtype: torch.dtype) -> None:
    """A zero that pruning made isn't the owner's; one that was there before is."""
    sent = torch.tensor([[1.0, 0.0, 3.0], [4.0, 5.0, 6.5], [0.0, 0.0, 0.0], [7.0, 0.0, 0.0]])
    assert found(OWN.to(dtype), sent.to(dtype)) == [[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_and_columns_wherever_they_stand(dtype: torch.dtype) -> None:
    own = OWN.to(dtype)
    assert found(own, own[[3, 1]]) == [[0] * 3, [1] * 3, [0] * 3, [1] * 3]
    assert found(own, own[:, [2, 0]]) == [[1, 0, 1]] * 4
    other = own[[3, 1]].clone()
    other[0, 1] = 1  # all others of the row stand where they stood, and yet it is no row of the owner's
    assert found(own, other) == [[0] * 3, [1] * 3, [0] * 3, [0] * 3]


def test_each_of_the_owners_rows_leaves_once() -> None:
    """The owner has one of row 1 and two of row 0 = row 2; three copies of a row leave with as many as there are."""
    assert leaves_verbatim(OWN, OWN[[1, 1, 1]]).sum() == 3
    assert leaves_verbatim(OWN, OWN[[0, 0]]).sum() == 6
    assert leaves_verbatim(OWN, OWN[[0, 0, 0, 0, 0, 1]]).sum() == 9
    assert leaves_verbatim(OWN, OWN[[0]]).sum() == 3


def test_what_is_no_part_of_the_owners() -> None:
    assert leaves_verbatim(OWN, OWN[:2, :2]).sum() == 0  # fewer rows and fewer columns
    same_bits = OWN.half().view(torch.bfloat16)
    assert leaves_verbatim(OWN.half(), same_bits).sum() == leaves_verbatim(OWN.half(), same_bits[:2]).sum() == 0
    assert leaves_verbatim(OWN, OWN[0]).sum() == 0
    assert leaves_verbatim(OWN, -OWN[:2]).sum() == 0


def test_biases_and_stacks() -> None:
    own = torch.tensor([1.0, 2.0, 3.0, 3.0])
    assert leaves_verbatim(own, torch.tensor([3.0, 1.0])).sum() == 2
    stack = torch.arange(24.0).view(2, 3, 4)
    for kept in (stack[[1]], stack[:, [0, 2]], stack[:, :, [3]]):
        assert torch.equal(leaves_verbatim(stack, kept), torch.isin(stack, kept))


# Methods


def test_pruned_of_units(family: str, pico: Pico, context_of: MakeContext) -> None:
    """Every number that is left is the owner's, in rows and columns; of GPT-2 in linears that were turned round."""
    context = context_of(pico(family), calibration=())
    built = compressed(Prune(0.5), context)
    assert numbers(built) < 0.6 * sum(p.numel() for i in context.middle for p in context.block(i).parameters())
    assert of_middle(built, context) == pytest.approx(numbers(built))


def test_pruned_in_bf16(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.bfloat16(), calibration=())
    built = compressed(Prune(0.5), context)
    assert of_middle(built, context) == pytest.approx(numbers(built))


def test_of_a_pruned_block_what_was_changed_does_not_leave(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    built = compressed(Prune(0.5), context)
    rows, columns = built.at(1).mlp.gate_proj.weight, built.at(1).mlp.down_proj.weight  # type: ignore[union-attr]
    before = numbers(built)
    with torch.no_grad():
        rows[2] *= 2  # type: ignore[index, operator]
        columns[5, 7] += 1  # type: ignore[index, operator]
    # a row of gate is 32 long, and so is a column of down
    assert of_middle(built, context) == pytest.approx(before - 32 - 32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tenths", [9, 7, 5])
def test_pruned_by_magnitude(family: str, tenths: int, pico: Pico, context_of: MakeContext) -> None:
    """Of every matrix numel - floor((1 - keep) numel) entries stay, and all norms and biases."""
    context = context_of(pico(family), calibration=())
    own = [p for index in context.middle for p in context.block(index).parameters()]
    stay = sum(p.numel() if p.dim() == 1 else p.numel() - p.numel() * (10 - tenths) // 10 for p in own)
    built = compressed(Prune(tenths / 10, mode="magnitude"), context)
    assert of_middle(built, context) == pytest.approx(stay)


def test_gradot(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Kept channels, a row of gate and of up and a column of down each, and norms; attention is factored."""
    context = context_of(pico_llama)
    built = compressed(GradOT(0.5), context)
    kept = 0
    for position in context.middle:
        block = built.at(position)
        linears = [block.get_submodule(f"self_attn.{name}_proj") for name in "qkvo"]
        assert all(isinstance(linear, LowRankLinear) for linear in linears)
        kept += linear_weight(block.get_submodule("mlp.up_proj")).shape[0]
    assert 0 < kept < 4 * 64
    norms = 4 * 2 * 32
    assert of_middle(built, context) == pytest.approx(norms + kept * 3 * 32)


def test_gradot_and_align(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """What writes is re-fitted, so of a kept channel gate and up are left."""
    context = context_of(pico_llama)
    built = compressed(GradOT(0.5), context)
    aligned = Align(where="all").compress(built, context)
    down = [[linear_weight(e.at(p).get_submodule("mlp.down_proj")) for e in (built, aligned)] for p in context.middle]
    refitted = [before.numel() for before, after in down if not torch.equal(before, after)]
    assert refitted
    assert of_middle(aligned, context) == pytest.approx(of_middle(built, context) - sum(refitted))


def test_dropped_layers(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = compressed(LayerDrop(2), context)
    assert of_middle(built, context) == pytest.approx(numbers(built))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_two_factors_leave_norms_and_biases(family: str, pico: Pico, context_of: MakeContext) -> None:
    """The bias of a factored linear is the owner's too, though it goes by another name."""
    context = context_of(pico(family), calibration=())
    built = compressed(LowRank(0.4, "plain"), context)
    assert not any(is_linear(context.block(2).get_submodule(p)) and is_linear(m) for p, m in named(built, context))
    assert of_middle(built, context) == pytest.approx(numbers(built, most=1))
    both = Quantize(bits=4).compress(built, context)
    assert of_middle(both, context) == pytest.approx(numbers(built, most=1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_packed_weights_leave_norms_and_biases(family: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family), calibration=())
    built = compressed(Quantize(bits=8), context)
    assert any(isinstance(module, QuantizedLinear) for _, module in named(built, context))
    assert of_middle(built, context) == pytest.approx(numbers(built, most=1))


def named(built: Emulator, context: Context) -> list[tuple[str, nn.Module]]:
    """Modules of the block at place 2 that the owner's has too."""
    own = dict(context.block(2).named_modules())
    return [(path, module) for path, module in built.at(2).named_modules() if path in own]


# Blocks that share an origin


def test_two_blocks_of_one_origin_count_what_leaves_with_either(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Of block 1 the one has up's rows 0 to 39 of 64, the other rows 30 to 63; together they are all of them."""
    context = context_of(pico_llama)
    first, second = (copy.deepcopy(context.block(1)) for _ in range(2))
    whole = numbers(Emulator([EmulatorBlock(first, 1)], {1: 0}))
    both = Emulator([EmulatorBlock(first, 1), EmulatorBlock(second, 1)], {1: 0, 2: 1, 3: 0, 4: 1})
    assert of_middle(both, context) == pytest.approx(whole)
    up = context.block(1).get_submodule("mlp.up_proj").weight
    for block, rows in ((first, slice(0, 40)), (second, slice(30, 64))):
        block.get_submodule("mlp.up_proj").weight = nn.Parameter(up[rows].detach().clone())  # type: ignore[index]
    assert of_middle(both, context) == pytest.approx(whole)
    one = Emulator([EmulatorBlock(second, 1)], {1: 0, 2: 0})
    assert of_middle(one, context) == pytest.approx(whole - 30 * 32)


def test_copies_of_what_leaves_anyway_add_nothing(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = Emulator([EmulatorBlock(copy.deepcopy(context.block(0)), 0)], {1: 0, 2: 0})
    assert of_middle(built, context) == pytest.approx(0, abs=1e-6)
