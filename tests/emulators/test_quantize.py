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

from offsite_fl.emulators.base import Emulator, EmulatorBlock, start
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.quantize import Quantize
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, is_linear, linear_weight, replace_module

from .conftest import context_of_nothing, make_context, untouched

Pico = Callable[..., nn.Module]


def quantized(model: nn.Module, **options: Any) -> Emulator:
    context = make_context(model)
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
        for _, packed, dense in pairs(quantized(pico_llama, bits=bits).at(1), make_context(pico_llama).block(1)):
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
    with untouched(model):
        block = quantized(model, bits=bits).at(3)
    own = make_context(model).block(3)
    linears = [path for path, module in own.named_modules() if is_linear(module)]
    assert [path for path, _, _ in pairs(block, own)] == linears
    for path, packed, dense in pairs(block, own):
        assert (packed.out_features, packed.in_features) == tuple(linear_weight(dense).shape), path
        assert packed.bias is None or torch.equal(packed.bias, dense.bias)  # type: ignore[arg-type]
        assert (packed.bias is None) == (dense.bias is None)
    for name, tensor in own.state_dict().items():
        if not name.endswith(".weight") or name.rpartition(".")[0] not in linears:
            assert torch.equal(block.state_dict()[name], tensor)


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
    context = make_context(pico_llama)
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
    context = make_context(pico_llama)
    once = Quantize().compress(start(context), context)
    with pytest.raises(EmulatorError, match=r"self_attn\.q_proj of emulator block 0 has 8-bit weights already"):
        Quantize(bits=4).compress(once, context)


def test_weights_that_are_not_finite_are_refused(pico_llama: nn.Module) -> None:
    context = make_context(pico_llama)
    with torch.no_grad():
        context.block(2).get_submodule("mlp.up_proj").weight[0, 0] = float("inf")  # type: ignore[operator, index]
    with pytest.raises(EmulatorError, match=r"mlp\.up_proj of emulator block 1 \(from block 2"):
        Quantize().compress(start(context), context)


def test_a_shared_block_is_packed_once_and_the_layout_stays(pico_llama: nn.Module) -> None:
    context = make_context(pico_llama)
    shared = Emulator([EmulatorBlock(context.block(2), 2), EmulatorBlock(context.block(4), 4)], {1: 0, 2: 0, 4: 1})
    made = Quantize().compress(shared, context)
    assert made.layout == {1: 0, 2: 0, 4: 1}
    assert [block.origin for block in made.blocks] == [2, 4]
    assert made.at(1) is made.at(2)


def test_the_spec_chains(pico_llama: nn.Module) -> None:
    method = parse_emulator("layer-drop:keep=2+quantize:bits=4,group=32")
    assert method == LayerDrop(2) + Quantize(4, 32)
    context = make_context(pico_llama)
    made = method.compress(start(context), context)
    assert made.positions == (1, 4)
    assert all(isinstance(p, QuantizedLinear) for _, p, _ in pairs(made.at(4), context.block(4)))
