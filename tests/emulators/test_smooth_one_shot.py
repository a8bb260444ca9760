"""The method smooth in one shot: what it computes, by hand, and what it leaves as it is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators import smooth
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.free_order import find_free
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.reorder import Order, reorder, smooth_order
from offsite_fl.emulators.smooth import Smooth
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight
from tests.emulators.test_penalties import difference_matrix
from tests.models import families
from tests.pico_classifiers import make_classifier

from .conftest import logits

MakeContext = Callable[..., Context]


def product(module: nn.Module) -> Tensor:
    """The weight that two factors stand for, fp64."""
    assert isinstance(module, LowRankLinear)
    return linear_weight(module.up).double() @ linear_weight(module.down).double()


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_a_factor_of_zero_is_the_plain_truncation(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    plain = LowRank(0.5, "plain").compress(start(context), context)
    for options in ({"reorder": False}, {}, {"attention": "d2", "dim": "both"}):
        built = Smooth(0.5, lam=0.0, **options).compress(start(context), context)  # type: ignore[arg-type]
        assert_close(logits(built, context), logits(plain, context), rtol=1e-3, atol=1e-4)
    as_it_stands = Smooth(0.5, lam=0.0, reorder=False).compress(start(context), context)
    for ours, theirs in zip(as_it_stands.blocks, plain.blocks, strict=True):
        assert_close(ours.module.state_dict(), theirs.module.state_dict())


def test_nuclear_norm_and_differences_by_hand(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Attention and down: singular values less lam ||W||_F. Gate and up: (I + 2 lam D'D)^-1 of the reordered W."""
    context = context_of(pico_llama, calibration=())
    lam = 0.02
    built = Smooth(0.5, lam=lam).compress(start(context), context).at(3)
    own = {path: linear_weight(linear).detach().double() for path, linear in dense_linears(context.block(3))}
    order = smooth_order(torch.cat([own["mlp.gate_proj"], own["mlp.up_proj"]], dim=1))
    own["mlp.down_proj"] = own["mlp.down_proj"][:, order]
    smoothing = torch.linalg.inv(torch.eye(64) + 2 * lam * difference_matrix(64, 2).T @ difference_matrix(64, 2))
    for path, weight in own.items():
        new = built.get_submodule(path)
        if path in ("mlp.gate_proj", "mlp.up_proj"):
            moved = smoothing @ weight[order]
        else:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            moved = (u * (s - lam * weight.norm()).clamp(min=0)) @ vt
        assert isinstance(new, LowRankLinear)
        assert_close(product(new), truncated(moved, new.rank), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("choice", "orders"), [("d1", (1,)), ("d1/d2", (1, 2))])
@pytest.mark.parametrize("dim", ["out", "in"])
def test_values_inside_heads_by_hand(
    dim: str, choice: str, orders: tuple[int, ...], pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """Two heads of 8 values, read twice each: ``out`` smooths rows head by head, ``in`` columns of what reads them."""
    context = context_of(pico("qwen2"), calibration=())
    lam, block = 0.1, context.block(3)
    method = Smooth(0.5, lam=lam, attention=choice, mlp="none", dim=dim)  # type: ignore[arg-type]
    built = method.compress(start(context), context).at(3)
    own = {path: linear_weight(linear).detach().double() for path, linear in dense_linears(block)}
    value, writer = own["self_attn.v_proj"], own["self_attn.o_proj"]
    differences = sum(difference_matrix(8, order).T @ difference_matrix(8, order) for order in orders)
    smoothing = torch.linalg.inv(torch.eye(8) + 2 * lam * differences)
    rows, columns = [], []
    for head in range(2):
        copies = [8 * (2 * head + copy) for copy in range(2)]
        alike = value[8 * head :][:8] if dim == "out" else torch.cat([writer[:, c : c + 8].T for c in copies], dim=1)
        order = smooth_order(alike)
        rows.append(8 * head + order)
        columns += [c + order for c in copies]
    place = torch.cat(rows)
    expected = {"self_attn.v_proj": value[place], "self_attn.o_proj": writer[:, torch.cat(columns)]}
    if dim == "out":
        expected["self_attn.v_proj"] = torch.cat([smoothing @ value[r] for r in rows])
    else:
        expected["self_attn.o_proj"] = torch.cat([writer[:, c] @ smoothing for c in columns], dim=1)
    others = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj" if dim == "out" else "self_attn.v_proj"}
    for path in ("self_attn.q_proj", "self_attn.k_proj", *expected):
        weight = expected.get(path, own[path])
        if path in others:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            weight = (u * (s - lam * weight.norm()).clamp(min=0)) @ vt
        new = built.get_submodule(path)
        assert isinstance(new, LowRankLinear)
        assert_close(product(new), truncated(weight, new.rank), rtol=1e-4, atol=1e-5)
    bias = linear_bias(block.get_submodule("self_attn.v_proj"))
    assert bias is not None
    assert_close(linear_bias(built.get_submodule("self_attn.v_proj")), bias[place])


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"rank": "energy"},
    {"dim": "both", "attention": "d1", "rank": "energy", "weighted": True},
    {"dim": "in", "mlp": "d1/d2", "weighted": True},
)


@pytest.mark.parametrize("options", OPTIONS)
def test_block_by_block_is_as_good_as_all_blocks_in_order_first(
    options: dict[str, Any], pico_llama: nn.Module, context_of: MakeContext
) -> None:
    context = context_of(pico_llama)
    method = Smooth(0.5, lam=0.05, **options)
    ordered = []
    for slot, parts in find_free(start(context), context).items():
        block = copy_structure(context.block(context.middle[slot]))
        for part in parts:
            if isinstance(part, ChannelChain) or method.attention != "nuc":
                reorder(block, part, method.rules.dims)
        ordered.append(EmulatorBlock(block, context.middle[slot]))
    by_hand = replace(method, reorder=False).compress(Emulator(ordered, start(context).layout), context)
    built = method.compress(start(context), context)
    for ours, theirs in zip(built.blocks, by_hand.blocks, strict=True):
        mine, other = (dict(b.module.named_modules()) for b in (ours, theirs))
        assert mine.keys() == other.keys()
        for path, module in mine.items():
            if isinstance(module, LowRankLinear):
                assert_close(product(module), product(other[path]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", ["budget", "energy"])
def test_no_two_blocks_are_in_memory_in_a_new_order(
    rank: str, pico_llama: nn.Module, context_of: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a block's linears are in their new order is gone before the next block is opened."""
    made: list[weakref.ref[nn.Module]] = []
    put, opened = smooth.put_in_order, []

    def noted(block: nn.Module, order: Order) -> None:
        gc.collect()
        opened.append(sum(linear() is not None for linear in made))
        put(block, order)
        made.extend(weakref.ref(block.get_submodule(path)) for path in (*order.rows, *order.columns))

    monkeypatch.setattr(smooth, "put_in_order", noted)
    context = context_of(pico_llama, calibration=())
    Smooth(0.5, rank=rank).compress(start(context), context)  # type: ignore[arg-type]
    # One chain of three linears a block; with ranks by energy each block is opened twice.
    assert len(made) == 3 * 4 * (2 if rank == "energy" else 1) and set(opened) == {0}


def test_by_default_a_vision_block_is_smoothed_along_its_mlps_channels(context_of: MakeContext) -> None:
    """Two linears around a GELU: the first by d2 in a new order, its bias too, the second and attention by nuc."""
    context = context_of(make_classifier("vit"), adapter=(0, 4), calibration=())
    lam, block = 0.02, context.block(2)
    built = Smooth(0.5, lam=lam).compress(start(context), context).at(2)
    order = smooth_order(linear_weight(block.get_submodule("mlp.fc1")).detach())
    assert order.tolist() != sorted(order.tolist())
    differences = difference_matrix(24, 2)
    smoothing = torch.linalg.inv(torch.eye(24) + 2 * lam * differences.T @ differences)
    for path, linear in dense_linears(block):
        weight = linear_weight(linear).detach().double()
        if path == "mlp.fc1":
            moved = smoothing @ weight[order]
        else:
            weight = weight[:, order] if path == "mlp.fc2" else weight
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            moved = (u * (s - lam * weight.norm()).clamp(min=0)) @ vt
        new = built.get_submodule(path)
        assert isinstance(new, LowRankLinear)
        assert_close(product(new), truncated(moved, new.rank), rtol=1e-4, atol=1e-5)
    assert_close(linear_bias(built.get_submodule("mlp.fc1")), linear_bias(block.get_submodule("mlp.fc1"))[order])  # type: ignore[index]


def test_by_default_a_block_without_free_channels_gets_the_nuclear_norm(context_of: MakeContext) -> None:
    """Of Mamba's mixer no channels can change places, and the note says so."""
    context = context_of(families.build("mamba"), calibration=())
    default, nuclear = (Smooth(0.5, mlp=mlp).compress(start(context), context) for mlp in ("auto", "nuc"))  # type: ignore[arg-type]
    for ours, theirs in zip(default.blocks, nuclear.blocks, strict=True):
        assert_close(ours.module.state_dict(), theirs.module.state_dict(), rtol=0, atol=0)
    assert any("no MLP channels whose order is free in 4 of 4 blocks" in note for note in default.notes)


def test_along_inputs(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """dim=in: down along its columns, in an order by these columns, gate and up by the nuclear norm."""
    context = context_of(pico_llama, calibration=())
    built = Smooth(0.5, lam=0.05, dim="in", mlp="d1").compress(start(context), context).at(1)
    weight = linear_weight(context.block(1).get_submodule("mlp.down_proj")).detach().double()
    ordered = weight[:, smooth_order(weight.T)]
    moved = ordered @ torch.linalg.inv(torch.eye(64) + 0.1 * difference_matrix(64, 1).T @ difference_matrix(64, 1))
    new = built.get_submodule("mlp.down_proj")
    assert isinstance(new, LowRankLinear)
    assert_close(product(new), truncated(moved, new.rank), rtol=1e-4, atol=1e-5)


def test_weighted_at_zero_is_the_activation_weighted_truncation(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    theirs = LowRank(0.5, "activation").compress(start(context), context)
    ours = Smooth(0.5, lam=0.0, weighted=True, reorder=False).compress(start(context), context)
    for path, _ in dense_linears(context.block(2)):
        both = [product(built.at(2).get_submodule(path)) for built in (ours, theirs)]
        assert_close(*both, rtol=1e-3, atol=1e-4)


def test_weighted_shrinks_in_the_space_of_the_inputs(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """X W*' has the singular values of X W' less lam times their norm, X being what the linear reads."""
    context = context_of(pico_llama)
    lam, path = 0.05, "self_attn.q_proj"
    built = Smooth(0.5, lam=lam, weighted=True).compress(start(context), context).at(1)
    seen: list[Tensor] = []
    linear = context.block(1).get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in context.calibration:
        context.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    kept = torch.cat([batch["attention_mask"] for batch in context.calibration]).bool()
    x = torch.cat(seen)[kept].double()
    before = torch.linalg.svdvals(x @ linear_weight(linear).detach().double().T)
    after = torch.linalg.svdvals(x @ product(built.get_submodule(path)).T)
    rank = built.get_submodule(path).rank
    assert_close(after[:rank], (before[:rank] - lam * before.norm()).clamp(min=0), rtol=1e-3, atol=1e-2)  # type: ignore[misc]


def test_energy_loses_less_than_equal_shares(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Both fit the budget; where spectra differ, ranks by energy leave more of the weights' squares behind."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index in (1, 2):
            for path in ("self_attn.q_proj", "mlp.up_proj"):
                weight = linear_weight(pico_llama.get_submodule(f"model.layers.{index}.{path}"))
                rows, columns = weight.shape
                weight.copy_(torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator))
    context = context_of(pico_llama, calibration=())
    whole = emulator_bytes(start(context))
    worst = []
    for rank in ("budget", "energy"):
        built = Smooth(0.5, lam=0.0, reorder=False, rank=rank).compress(start(context), context)  # type: ignore[arg-type]
        assert emulator_bytes(built) <= whole / 2
        lost = []
        for block in built.blocks:
            for path, linear in dense_linears(context.block(block.origin)):
                new, weight = block.module.get_submodule(path), linear_weight(linear).detach().double()
                stands = product(new) if isinstance(new, LowRankLinear) else linear_weight(new).double()
                lost.append(float((stands - weight).square().sum() / weight.square().sum()))
        worst.append(max(lost))
    assert worst[1] < 0.8 * worst[0]


def test_what_is_not_cut_is_not_moved(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    for mode in ("prox", "train"):
        built = Smooth(1.0, mode, lam=0.1).compress(start(context), context)  # type: ignore[arg-type]
        for block in built.blocks:
            assert block.module is not context.block(block.origin)
            theirs = context.block(block.origin).state_dict()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in block.module.state_dict().items())
        assert built.notes == ()


def test_no_text_is_needed_unless_it_is_asked_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    Smooth().compress(start(context), context)
    for method, match in (
        (Smooth(weighted=True), "weighted=true needs calibration text"),
        (Smooth(mode="train"), "mode=train needs calibration text"),
    ):
        with pytest.raises(EmulatorError, match=match):
            method.compress(start(context), context)
