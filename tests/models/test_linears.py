"""The closed table of replacement linears: what each computes, keeps for backward, and how it is described."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from offsite_fl.errors import ModelError
from offsite_fl.models.linears import (
    LowRankLinear,
    QuantizedLinear,
    apply_linears,
    describe_linears,
    is_linear,
    linear_bias,
    linear_weight,
    replace_module,
)


def linear(out: int, width: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, out, bias=bias)


def conv1d(out: int, width: int) -> Conv1D:
    module = Conv1D(out, width)
    with torch.no_grad():
        module.weight.copy_(torch.arange(out * width).view(width, out) / 10)
        module.bias.copy_(torch.arange(out) * 1.0)
    return module


def test_conv1d_is_a_linear_stored_the_other_way() -> None:
    module, x = conv1d(3, 5), torch.randn(2, 5)
    assert is_linear(module) and not is_linear(nn.LayerNorm(3))
    weight, bias = linear_weight(module), linear_bias(module)
    assert weight.shape == (3, 5) and weight.data_ptr() == module.weight.data_ptr()
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), module(x))
    assert linear_bias(nn.Linear(2, 2, bias=False)) is None


def test_low_rank_is_the_product_of_its_factors() -> None:
    up, down, bias = torch.randn(6, 2), torch.randn(2, 5), torch.randn(6)
    module, x = LowRankLinear.from_factors(up, down, bias), torch.randn(3, 4, 5)
    assert (module.in_features, module.out_features, module.rank) == (5, 6, 2)
    assert sum(parameter.numel() for parameter in module.parameters()) == 2 * (5 + 6) + 6
    torch.testing.assert_close(module(x), x @ (up @ down).T + bias)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_quantised_by_hand(bits: int, levels: int) -> None:
    dense = nn.Linear(4, 1, bias=False)
    dense.weight = nn.Parameter(torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * levels)
    module = QuantizedLinear.from_linear(dense, bits, group=4)
    assert module.scales.tolist() == [[1.0]]
    expected = [float(round(v * levels)) for v in (1.0, -0.5, 0.25, 0.0)]  # ties to even, as torch rounds
    assert module.dequantized().tolist() == [expected]
    if bits == 4:
        low, high = module.packed[0].tolist()  # two nibbles a byte, offset 8, first column in the low one
        assert (low & 15, low >> 4, high & 15, high >> 4) == tuple(int(v) + 8 for v in expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [lambda: linear(7, 50), lambda: conv1d(7, 50)], ids=["linear", "conv1d"])
def test_quantised_error_is_at_most_half_a_level(bits: int, make: Callable[[], nn.Module]) -> None:
    dense = make()
    module = QuantizedLinear.from_linear(dense, bits, group=16)  # 50 columns: the last group is a partial one
    error = (module.dequantized() - linear_weight(dense)).abs()
    steps = module.scales.float().repeat_interleave(16, dim=1)[:, :50]
    assert bool((error <= steps / 2 * 1.001).all())
    x = torch.randn(3, 50)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.dequantized(), linear_bias(dense)))
    assert len(module.dequantized().unique()) > 2


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-4, 1e3])
def test_quantised_extremes_stay_finite(scale: float) -> None:
    dense = linear(4, 32, bias=False)
    with torch.no_grad():
        dense.weight.mul_(scale)
    module = QuantizedLinear.from_linear(dense, 8, group=32)
    error = float((module.dequantized() - dense.weight).abs().max().detach())
    assert error <= max(float(dense.weight.detach().abs().max()) / 127, 2.0**-24)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_backward_keeps_no_dense_weight(bits: int) -> None:
    module = QuantizedLinear.from_linear(linear(24, 40), bits, group=8)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x)
    assert kept and not any(t.is_floating_point() and t.numel() >= 24 * 40 for t in kept)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ module.dequantized())


def test_quantised_keeps_the_dtype_of_its_input() -> None:
    module = QuantizedLinear.from_linear(linear(8, 16), 4, group=8)
    x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "group"), [(3, 8), (16, 8), (4, 5)])
def test_quantised_settings_are_checked(bits: int, group: int) -> None:
    with pytest.raises(ModelError, match="quantized linear"):
        QuantizedLinear(5, 5, bits, group, bias=False)


def small_block() -> nn.Module:
    block = nn.Module()
    block.a, block.b, block.c, block.d = linear(6, 8), linear(8, 6, bias=False), linear(4, 4), conv1d(8, 8)
    block.norm = nn.LayerNorm(8)
    return block


def replaced() -> nn.Module:
    block = small_block()
    low_rank = LowRankLinear.from_factors(torch.randn(6, 2), torch.randn(2, 8), torch.randn(6))
    low_rank.up = QuantizedLinear.from_linear(low_rank.up, 8, group=2)
    block.a, block.b = low_rank, nn.Linear(3, 8, bias=False)
    block.d = QuantizedLinear.from_linear(conv1d(8, 8), 4, group=8)
    return block


EXPECTED = {
    "a": {"kind": "low-rank", "in": 8, "out": 6, "rank": 2, "bias": True},
    "a.up": {"kind": "quantized", "in": 2, "out": 6, "bits": 8, "group": 2, "bias": True},
    "b": {"kind": "resized", "in": 3, "out": 8, "bias": False},
    "d": {"kind": "quantized", "in": 8, "out": 8, "bits": 4, "group": 8, "bias": True},
}


def test_description_and_rebuilding() -> None:
    block = replaced()
    assert describe_linears(small_block(), small_block()) == {}
    assert describe_linears(block, small_block()) == EXPECTED
    fresh = small_block().to("meta")
    apply_linears(fresh, dict(reversed(EXPECTED.items())))
    assert all(tensor.is_meta for tensor in fresh.state_dict().values())
    fresh.load_state_dict(block.state_dict(), strict=True, assign=True)
    assert describe_linears(fresh, small_block()) == EXPECTED
    x = torch.randn(2, 8)
    for name in ("a", "d"):
        torch.testing.assert_close(fresh.get_submodule(name)(x), block.get_submodule(name)(x))


def test_replace_module_at_any_depth() -> None:
    outer = nn.Sequential(nn.Sequential(linear(2, 2)))
    replace_module(outer, "0.0", linear(3, 2))
    replace_module(outer, "0", outer.get_submodule("0.0"))
    assert linear_weight(outer[0]).shape == (3, 2)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("a", {"kind": "pickle"}, "unknown kind 'pickle'; .*low-rank"),
        ("a", {"kind": 3}, "unknown kind 3"),
        ("a", {"code": "x"}, "a low-rank entry has fields"),
        ("a", {"rank": 0}, "rank = 0 is out of range"),
        ("a", {"rank": 2**40}, "rank = .* is out of range"),
        ("a", {"rank": True}, "rank = True is out of range"),
        ("a", {"bias": 1}, "bias = 1 is out of range"),
        ("a", {"in": 9}, "has sizes 9x6, not the block's"),
        ("b", {"out": -8}, "out = -8 is out of range"),
        ("d", {"bits": 5}, "bits"),
    ],
)
def test_malformed_descriptions(path: str, changes: dict[str, Any], message: str) -> None:
    table = copy.deepcopy(EXPECTED)
    table[path] |= changes
    with pytest.raises(ModelError, match=message):
        apply_linears(small_block(), table)


HARMONIZER = {"kind": "harmonizer", "in": 8, "rank": 2, "returns": 0}


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("a", {}, "'a': a harmonizer replaces a whole block"),
        ("", {"rank": 0}, "rank = 0 is out of range"),
        ("", {"rank": 2**24 + 1}, "rank = 16777217 is out of range"),
        ("", {"in": 2**40}, "in = .* is out of range"),
        ("", {"in": 8.0}, r"in = 8\.0 is out of range"),
        ("", {"returns": -1}, "returns = -1 is out of range"),
        ("", {"returns": 2**24}, "returns = 16777216 is out of range"),
        ("", {"returns": True}, "returns = True is out of range"),
        ("", {"bias": True}, r"a harmonizer entry has fields \['in', 'rank', 'returns'\]"),
        ("", {"in": 9}, "a harmonizer of 9 features, the blocks have 8"),
    ],
)
def test_malformed_harmonizers(path: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        apply_linears(small_block(), {path: HARMONIZER | changes}, width=8)


@pytest.mark.parametrize(
    ("path", "entry", "message"),
    [
        ("a", EXPECTED["a"], "names 'a', which this kind of block doesn't have"),
        ("down", EXPECTED["d"], "'down' has sizes 8x8, not the block's"),
        ("rank", EXPECTED["d"], "names 'rank', which"),
    ],
)
def test_inside_a_harmonizer_nothing_of_the_block_is_left(path: str, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        apply_linears(small_block(), {path: entry, "": HARMONIZER})


def test_the_largest_harmonizer_takes_no_memory() -> None:
    entry = HARMONIZER | {"in": 2**24, "rank": 2**24}
    made = apply_linears(small_block(), {"": entry})
    assert {tuple(t.shape) for t in made.parameters() if t.ndim == 2} == {(2**24, 2**24)}
    assert all(t.is_meta for t in made.parameters())


@pytest.mark.parametrize("kind", ["a", "b", "d"])
def test_other_kinds_do_not_replace_a_block(kind: str) -> None:
    with pytest.raises(ModelError, match="isn't a linear layer"):
        apply_linears(small_block(), {"": EXPECTED[kind]})


@pytest.mark.parametrize(("path", "message"), [("z.q", "doesn't have"), ("norm", "isn't a linear layer")])
def test_descriptions_of_what_is_not_there(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        apply_linears(small_block(), {path: EXPECTED["a"]})


RESIZED = {
    "a": {"kind": "low-rank", "in": 7, "out": 5, "rank": 2, "bias": True, "resized": True},
    "a.down": {"kind": "quantized", "in": 7, "out": 2, "bits": 8, "group": 8, "bias": False},
    "d": {"kind": "quantized", "in": 4, "out": 8, "bits": 4, "group": 4, "bias": True, "resized": True},
}


def test_what_replaces_a_pruned_linear_says_so() -> None:
    block = small_block()
    block.a = LowRankLinear.from_factors(torch.randn(5, 2), torch.randn(2, 7), torch.randn(5))
    block.a.down = QuantizedLinear.from_linear(block.a.down, 8, group=8)
    block.d = QuantizedLinear.from_linear(linear(8, 4), 4, group=4)
    assert describe_linears(block, small_block()) == RESIZED
    fresh = small_block().to("meta")
    apply_linears(fresh, RESIZED)
    fresh.load_state_dict(block.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 7)
    torch.testing.assert_close(fresh.get_submodule("a")(x), block.get_submodule("a")(x))


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("a", {"resized": False}, "resized = False is out of range"),
        ("d", {"resized": 1}, "resized = 1 is out of range"),
        ("a", {"in": 2**24 + 1}, "in = 16777217 is out of range"),
        ("a.down", {"in": 9}, "'a.down' has sizes 9x2, not the block's"),
    ],
)
def test_malformed_resized_linears(path: str, changes: dict[str, Any], message: str) -> None:
    table = {name: entry | changes if name == path else entry for name, entry in RESIZED.items()}
    with pytest.raises(ModelError, match=message):
        apply_linears(small_block(), table)


@pytest.mark.parametrize("kind", ["resized", "harmonizer"])
def test_other_kinds_carry_no_such_mark(kind: str) -> None:
    table = {"b": EXPECTED["b"] | {"resized": True}} if kind == "resized" else {"": HARMONIZER | {"resized": True}}
    with pytest.raises(ModelError, match=f"a {kind} entry has fields"):
        apply_linears(small_block(), table)


def test_replaced_linears_still_have_a_weight_and_a_bias() -> None:
    # Mamba multiplies by dt_proj.weight itself, T5 asks wo.weight for its dtype
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(8, 6)
    dense.weight.data = torch.randn(6, 8, generator=generator)
    packed = QuantizedLinear.from_linear(dense, bits=8, group=8)
    assert torch.equal(packed.weight, packed.dequantized()) and packed.weight.shape == (6, 8)
    up, down = torch.randn(6, 2, generator=generator), torch.randn(2, 8, generator=generator)
    low = LowRankLinear.from_factors(up, down, dense.bias)
    torch.testing.assert_close(low.weight, up @ down)
    x = torch.randn(3, 8, generator=generator)
    assert low.bias is not None
    torch.testing.assert_close(x @ low.weight.T + low.bias, low(x))
    low.up = QuantizedLinear.from_linear(low.up, bits=8, group=2)
    torch.testing.assert_close(low.weight, low.up.dequantized() @ down)
    assert "weight" not in dict(low.named_parameters()) and LowRankLinear.from_factors(up, down, None).bias is None


def test_what_counts_as_a_linear() -> None:
    class Written(nn.Linear):
        """Falcon's: the same map in other words."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = x @ self.weight.T
            return out if self.bias is None else out + self.bias

    class Router(nn.Linear):
        """Returns more than the product."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:  # type: ignore[override]
            return super().forward(x), 1

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    before = torch.random.get_rng_state()
    found = [is_linear(cls(3, 2)) for cls in (nn.Linear, Written, Router, Scaled)]
    assert found == [True, True, False, False]
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    [cls(3, 2) for cls in (nn.Linear, Written, Router, Scaled)]
    assert torch.equal(torch.random.get_rng_state(), after)  # asking draws no random number
