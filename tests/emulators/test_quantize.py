"""Packed weights: real bytes, few levels, bounded error, the same network as with the dequantised weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.budget import emulator_bytes, stored_bytes
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.quantize import Quantize, fake_quantized
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, is_linear, linear_weight, replace_module

Pico = Callable[..., nn.Module]
MIDDLE = (1, 2, 3, 4)


def context_of(model: nn.Module) -> Context:
    return Context(model, find_blocks(model), (0, 5), MIDDLE)


def quantized(model: nn.Module, **options: Any) -> Emulator:
    context = context_of(model)
    return Quantize(**options).compress(start(context), context)


def pairs(packed: nn.Module, dense: nn.Module) -> list[tuple[str, QuantizedLinear, nn.Module]]:
    return [
        (path, module, dense.get_submodule(path))
        for path, module in packed.named_modules()
        if isinstance(module, QuantizedLinear)
    ]


def by_group(values: Tensor, group: int) -> Tensor:
    """[out, in] to [out, groups, group], the last group padded with zeros."""
    return nn.functional.pad(values, (0, -values.shape[1] % group)).view(len(values), -1, group)


def bytes_on_disk(block: nn.Module, path: Path) -> int:
    save_file({name: tensor.contiguous() for name, tensor in block.state_dict().items()}, path)
    return path.stat().st_size


@pytest.mark.parametrize(("bits", "share"), [(8, 0.32), (4, 0.2)])
def test_bytes_on_disk_fall(pico_llama: nn.Module, tmp_path: Path, bits: int, share: float) -> None:
    """Against fp32: a quarter or an eighth plus fp16 scales (2 bytes for 32 weights or more), norms and header."""
    packed = quantized(pico_llama, bits=bits).at(2)
    wide = pico_llama.get_submodule("model.layers.2")
    before, after = (bytes_on_disk(b, tmp_path / "block.safetensors") for b in (wide, packed))
    header = 1500  # names and offsets in the file; next to nothing in a real model, a few per cent of a pico block
    assert after - header < share * before


def test_packed_weights_take_exactly_the_promised_bytes(pico_llama: nn.Module) -> None:
    for bits in (8, 4):
        for _, packed, dense in pairs(quantized(pico_llama, bits=bits).at(1), context_of(pico_llama).block(1)):
            out, inputs = linear_weight(dense).shape
            assert packed.packed.nbytes == out * inputs * bits // 8
            assert packed.scales.nbytes == 2 * out * -(-inputs // 64)


def test_a_group_stores_little_padding() -> None:
    """410 inputs (a low-rank factor) in groups of 64 at most: 7 groups of 59, even 60; 66 inputs: 2 groups of 34."""
    assert [Quantize()._even_group(n) for n in (1, 5, 32, 64, 66, 128, 410)] == [2, 6, 32, 64, 34, 64, 60]
    assert [Quantize(group=0)._even_group(n) for n in (1, 5, 66, 1536)] == [2, 6, 66, 1536]  # one scale an output


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
def test_levels_and_error_are_bounded(bits: int, scale: float) -> None:
    """Also for small weights, where fp16 scales are subnormal, a constant group and a group of zeros."""
    linear = nn.Linear(2048, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-scale, scale, 2048))
        linear.weight[0, :1024], linear.weight[1] = 0.5 * scale, 0.0
        linear.weight[3] = linear.weight[3].view(1024, 2).T.reshape(-1)  # the whole range in either group
    block = nn.Sequential(linear)
    made = Quantize(bits=bits, group=1024).compress(Emulator([EmulatorBlock(block, 1)], {1: 0}), context_of_nothing())
    packed = made.at(1)[0]  # type: ignore[index]
    assert isinstance(packed, QuantizedLinear)
    weight = packed.dequantized()
    levels = [len(group.unique()) for row in by_group(weight, packed.group) for group in row]
    assert max(levels) <= 2**bits
    assert (levels[0], levels[2]) == (1, 1)
    if scale == 1.0:  # -1..0 and 0..1 in row 2: half of the 2^bits - 1 symmetric levels and the zero
        assert levels[4:] == [2 ** (bits - 1)] * 2 + [2**bits - 1] * 2
    step = packed.scales.float().unsqueeze(-1)
    error = by_group((weight - linear.weight).detach(), packed.group).abs()
    assert bool((error <= step / 2 * (1 + 1e-5)).all())
    assert not weight[1].any()


def context_of_nothing() -> Context:
    return Context(nn.Identity(), None, (), ())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 2, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="8 or 4 bits"):
        Quantize(bits=bits)


def test_an_odd_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="even"):
        Quantize(group=63)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_linear_of_every_family_is_packed_and_nothing_else_changes(pico: Pico, family: str, bits: int) -> None:
    model = pico(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    block, own = quantized(model, bits=bits).at(3), context_of(model).block(3)
    linears = [path for path, module in own.named_modules() if is_linear(module)]
    assert [path for path, _, _ in pairs(block, own)] == linears
    for path, packed, dense in pairs(block, own):
        assert (packed.out_features, packed.in_features) == tuple(linear_weight(dense).shape), path
        assert packed.bias is None or torch.equal(packed.bias, dense.bias)  # type: ignore[arg-type]
        assert (packed.bias is None) == (dense.bias is None)
    for name, tensor in own.state_dict().items():
        if not name.endswith(".weight") or name.rpartition(".")[0] not in linears:
            assert torch.equal(block.state_dict()[name], tensor)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def densified(block: nn.Module) -> nn.Module:
    """The slow reference: ordinary linears with the dequantised weights."""
    dense = copy.deepcopy(block)
    for path, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantized()
            if module.bias is not None:
                linear.bias.data = module.bias.data
            replace_module(dense, path, linear)
    return dense


@pytest.mark.parametrize("bits", [8, 4])
def test_forward_and_input_gradient_equal_the_dequantised_network(pico: Pico, bits: int) -> None:
    block = quantized(pico("gpt2"), bits=bits, group=10).at(2)
    gradients, outputs = [], []
    for module in (block, densified(block)):
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = module(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(x.grad)
    assert_close(*outputs)
    assert_close(*gradients)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_dequantised_weight_waits_for_the_backward_pass(bits: int) -> None:
    linear = nn.Linear(48, 80)
    made = Quantize(bits=bits).compress(
        Emulator([EmulatorBlock(nn.Sequential(linear), 1)], {1: 0}), context_of_nothing()
    )
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(3, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.at(1)(x).sum().backward()
    assert saved, "the packed weight itself is saved"
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= linear.weight.numel()]
    assert sum(t.nbytes for t in saved) < linear.weight.nbytes / 2


def test_factors_of_a_low_rank_linear_are_packed(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    block = copy.deepcopy(context.block(1))
    factors = torch.randn(32, 6), torch.randn(6, 32)
    replace_module(block, "self_attn.q_proj", LowRankLinear.from_factors(*factors, None))
    made = Quantize().compress(Emulator([EmulatorBlock(block, 1)], {1: 0}), context)
    low_rank = made.at(1).get_submodule("self_attn.q_proj")
    assert isinstance(low_rank, LowRankLinear)
    assert isinstance(low_rank.up, QuantizedLinear)
    assert isinstance(low_rank.down, QuantizedLinear)
    assert (low_rank.up.in_features, low_rank.down.in_features) == (6, 32)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    dense = x @ factors[1].T @ factors[0].T
    assert (low_rank(x) - dense).norm() / dense.norm() < 0.02


def test_conv1d_turns_into_the_standard_orientation() -> None:
    conv = Conv1D(12, 8)  # 8 inputs, 12 outputs, stored [in, out]
    made = Quantize().compress(Emulator([EmulatorBlock(nn.Sequential(conv), 1)], {1: 0}), context_of_nothing())
    packed = made.at(1)[0]  # type: ignore[index]
    assert isinstance(packed, QuantizedLinear)
    assert packed.packed.shape == (12, 8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert_close(packed(x), conv(x).detach(), atol=1e-3, rtol=0.02)


def test_already_quantised_is_refused(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    once = Quantize().compress(start(context), context)
    with pytest.raises(EmulatorError, match=r"self_attn\.q_proj of emulator block 0 has 8-bit weights already"):
        Quantize(bits=4).compress(once, context)


def test_weights_that_are_not_finite_are_refused(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    with torch.no_grad():
        context.block(2).get_submodule("mlp.up_proj").weight[0, 0] = float("inf")  # type: ignore[operator, index]
    with pytest.raises(EmulatorError, match=r"mlp\.up_proj of emulator block 1 \(from block 2"):
        Quantize().compress(start(context), context)


def test_a_shared_block_is_packed_once_and_the_layout_stays(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    shared = Emulator([EmulatorBlock(context.block(2), 2), EmulatorBlock(context.block(4), 4)], {1: 0, 2: 0, 4: 1})
    made = Quantize().compress(shared, context)
    assert made.layout == {1: 0, 2: 0, 4: 1}
    assert [block.origin for block in made.blocks] == [2, 4]
    assert made.at(1) is made.at(2)


def test_the_spec_chains(pico_llama: nn.Module) -> None:
    method = parse_emulator("layer-drop:keep=2+quantize:bits=4,group=32")
    assert method == LayerDrop(2) + Quantize(4, 32)
    context = context_of(pico_llama)
    made = method.compress(start(context), context)
    assert made.positions == (1, 4)
    assert all(isinstance(p, QuantizedLinear) for _, p, _ in pairs(made.at(4), context.block(4)))


def held_share(built: Emulator, context: Context) -> float:
    return emulator_bytes(built) / emulator_bytes(start(context))


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_a_budget_in_every_family(pico: Pico, family: str, keep: float) -> None:
    """Never above it; within 2 %, or a note where the next step of every single linear is too large for that."""
    model = pico(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = context_of(model)
    built = Quantize(keep=keep).compress(start(context), context)
    left = round(keep * emulator_bytes(start(context))) - emulator_bytes(built)
    assert left >= 0
    assert bool(built.notes) == (keep - held_share(built, context) > 0.02)
    for block in built.blocks:
        for path, dense in context.block(block.origin).named_modules():
            if is_linear(dense):
                now = block.module.get_submodule(path)
                bits = getattr(now, "bits", None)
                wider = dense if bits == 8 else QuantizedLinear.from_linear(dense, 8, getattr(now, "group", 32))
                assert bits is None or stored_bytes([wider]) - stored_bytes([now]) > left
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(emulated_network(built, context)(input_ids=ids).logits).all())


@pytest.mark.parametrize(
    ("dtype", "keep"),
    [*((torch.float32, k) for k in (0.2, 0.3, 0.5, 0.8)), *((torch.bfloat16, k) for k in (0.4, 0.5, 0.6, 0.9))],
)
def test_a_budget_is_met_where_linears_are_many(pico_llama: nn.Module, dtype: torch.dtype, keep: float) -> None:
    """28 linears here; of fp32 4 bits take about a sixth, of bf16 a third."""
    context = context_of(pico_llama.to(dtype))
    built = Quantize(keep=keep).compress(start(context), context)
    assert built.notes == () and abs(held_share(built, context) - keep) <= 0.02


def test_a_budget_in_bytes(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = parse_emulator(f"quantize:bytes={whole // 4}").compress(start(context), context)
    assert 0 <= whole // 4 - emulator_bytes(built) <= 0.02 * whole


def test_all_of_the_bytes_change_nothing(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    built = Quantize(keep=1).compress(start(context), context)
    for path, linear in context.block(2).named_modules():
        if is_linear(linear):
            assert built.at(2).get_submodule(path).weight is linear.weight


def test_less_than_4_bits_take_is_noted(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    built = Quantize(keep=0.05).compress(start(context), context)
    least = Quantize(bits=4).compress(start(context), context)
    assert emulator_bytes(built) == emulator_bytes(least)
    assert len(built.notes) == 1 and "asked for 5.0% of the bytes" in built.notes[0] and "4 bits" in built.notes[0]


def test_a_budget_between_two_linears_is_noted() -> None:
    """One linear: 4 bits (32 + 16 bytes), 8 bits (64 + 16) or 256 bytes; nothing near 180."""
    block = nn.Sequential(nn.Linear(8, 8, bias=False))
    made = Quantize(bytes="180").compress(Emulator([EmulatorBlock(block, 1)], {1: 0}), context_of_nothing())
    assert emulator_bytes(made) == 80
    assert "asked for 70.3% of the bytes and holds 31.2%" in made.notes[0] and "8, or stays as it is" in made.notes[0]


def plain_error(weight: Tensor, bits: int) -> float:
    """``||W - W'||^2 / ||W||^2``, one scale a row, element by element."""
    top, wrong, size = 2 ** (bits - 1) - 1, 0.0, 0.0
    for row in weight.tolist():
        scale = float(torch.tensor(max(map(abs, row)) / top).half())
        scale = scale if scale >= max(map(abs, row)) / top else scale * (1 + 2**-10)
        for value in row:
            wrong += (value - min(max(round(value / scale), -top), top) * scale) ** 2
            size += value**2
    return wrong / size


def test_bits_go_where_the_error_falls_most_for_a_byte() -> None:
    """Three linears of 64 weights and one of 16; the order of raising follows from their errors, played out here."""
    generator = torch.Generator().manual_seed(4)
    linears = [nn.Linear(8, n, bias=False) for n in (8, 8, 8, 2)]
    for linear, power in zip(linears, (1, 3, 7, 1), strict=True):
        with torch.no_grad():  # high powers: a few large weights, so that small ones lose more
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) ** power)
    block = nn.Sequential(*linears)
    sizes = {4: 0.5 + 2 / 8, 8: 1 + 2 / 8, None: 4.0}  # bytes a weight, a scale of two bytes for eight

    def cost(number: int, bits: int | None) -> float:
        return linears[number].weight.numel() * sizes[bits]

    def error(number: int, bits: int | None) -> float:
        return 0.0 if bits is None else plain_error(linears[number].weight.detach(), bits)

    chosen: list[int | None] = [4] * 4
    for _ in range(8):
        options = []
        for number, bits in enumerate(chosen):
            if bits is not None:
                more = 8 if bits == 4 else None
                gain = (error(number, bits) - error(number, more)) / (cost(number, more) - cost(number, bits))
                options.append((gain, number, more))
        _, raised, chosen_bits = max(options)
        chosen[raised] = chosen_bits
        budget = sum(cost(n, b) for n, b in enumerate(chosen))
        method = Quantize(group=8, bytes=str(int(budget)))
        made = method.compress(Emulator([EmulatorBlock(block, 1)], {1: 0}), context_of_nothing())
        found = [getattr(module, "bits", None) for module in made.at(1)]  # type: ignore[union-attr]
        assert found == chosen and emulator_bytes(made) == budget


def test_factors_and_shared_blocks_under_a_budget(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    chain = parse_emulator("layer-drop:keep=2+low-rank:keep=0.6,mode=plain+quantize:keep=0.4")
    made = chain.compress(start(context), context)
    assert made.notes == () and held_share(made, context) == pytest.approx(0.5 * 0.6 * 0.4, abs=0.02)
    shared = Emulator([EmulatorBlock(context.block(2), 2), EmulatorBlock(context.block(4), 4)], {1: 0, 2: 0, 4: 1})
    made = Quantize(keep=0.3).compress(shared, context)
    assert made.layout == shared.layout and emulator_bytes(made) <= 0.3 * emulator_bytes(shared)


def legacy(weight: Tensor, bits: int) -> Tensor:
    """``zp = (max + min) / 2``, ``s = (max - min) / (2^b - 1)``, ``round((w - zp) / s) * s + zp``."""
    zp, s = (weight.max() + weight.min()) / 2, (weight.max() - weight.min()) / (2**bits - 1)
    return torch.round((weight - zp) / s) * s + zp


@pytest.mark.parametrize("bits", range(1, 9))
def test_legacy_is_the_papers_formula(bits: int, pico: Pico) -> None:
    """Of every tensor with more than one dimension, Conv1D's too; nothing else changes and no bytes are saved."""
    context = context_of(pico("gpt2"))
    built = Quantize(bits, mode="legacy-fake").compress(start(context), context)
    own = dict(context.block(2).named_parameters())
    for name, tensor in built.at(2).named_parameters():
        if tensor.ndim > 1:
            assert_close(tensor, legacy(own[name].detach(), bits), rtol=1e-6, atol=1e-6, check_device=False)
            assert len(tensor.unique()) <= 2**bits + 1
        else:
            assert tensor is own[name]
    assert emulator_bytes(built) == emulator_bytes(start(context))
    assert len(built.notes) == 1 and "no bytes are saved" in built.notes[0]


def test_legacy_with_one_bit_is_a_constant_and_with_8_has_257_levels() -> None:
    """The zero point is mid-range, so the ends lie half a level off: 255 steps reach from -127.5 to 127.5."""
    weight = torch.linspace(-127.5, 127.5, 511).view(7, 73)
    assert fake_quantized(weight + 3, 1).unique().tolist() == [3.0]
    assert fake_quantized(weight, 8).unique().tolist() == [float(v) for v in range(-128, 129)]
    assert torch.equal(fake_quantized(torch.full((2, 2), 0.3), 4), torch.full((2, 2), 0.3))


@pytest.mark.parametrize("mode", ["packed", "legacy-fake"])
def test_modes_in_every_family(pico: Pico, family: str, mode: str) -> None:
    context = context_of(pico(family))
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    method = parse_emulator(f"quantize:mode={mode},bits=4")
    assert parse_emulator(str(method)) == method
    built = method.compress(start(context), context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(emulated_network(built, context)(input_ids=ids).logits).all())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quantize:mode=legacy-fake,bits=0", "legacy-fake takes 1 to 8"),
        ("quantize:mode=legacy-fake,bits=9", "legacy-fake takes 1 to 8"),
        ("quantize:mode=legacy-fake,keep=0.5", "leave out keep and bytes"),
        ("quantize:mode=legacy-fake,bytes=3MB", "leave out keep and bytes"),
        ("quantize:mode=legacy", "did you mean 'legacy-fake'"),
        ("quantize:bits=3", "8 or 4 bits"),
        ("quantize:keep=0", "must be a share above 0"),
        ("quantize:keep=1.5", "must be a share above 0"),
        ("quantize:bytes=0", "must be above 0"),
    ],
)
def test_impossible_options(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_emulator(spec)


@pytest.mark.parametrize("spec", ["quantize:keep=0.3", "quantize:group=32,bytes=3MB", "quantize"])
def test_options_and_back(spec: str) -> None:
    assert str(parse_emulator(spec)) == spec
    assert parse_emulator("quantize:keep=") == Quantize()


def test_legacy_behind_packed_is_refused(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match="8-bit weights already"):
        parse_emulator("quantize+quantize:mode=legacy-fake").compress(start(context), context)
