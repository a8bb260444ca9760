"""A packed weight that is too large is dequantised a few rows at a time, and no result changes by that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from offsite_fl.models import linears
from offsite_fl.models.linears import QuantizedLinear


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each weight that was dequantised, padding included; at most 64 at a time are allowed."""
    sizes: list[int] = []
    original = linears._unpack

    def watched(packed: torch.Tensor, scales: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(scales.numel() * rest[1])
        return original(packed, scales, *rest)

    monkeypatch.setattr(linears, "_unpack", watched)
    monkeypatch.setattr(linears, "MAX_DEQUANTIZED", 64)
    return sizes


def quantised(bits: int, out: int = 24, width: int = 14, group: int = 4) -> QuantizedLinear:
    """14 columns in groups of 4 are stored as 16: four rows are 64 elements."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QuantizedLinear.from_linear(nn.Linear(width, out), bits, group)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_large_weight_is_never_dequantised_whole(bits: int, unpacked: list[int]) -> None:
    module = quantised(bits, out=26)
    x = torch.randn(3, 5, 14, requires_grad=True)
    out = module(x)
    assert unpacked == [64] * 6 + [32]
    out.backward(torch.ones_like(out))
    assert unpacked == ([64] * 6 + [32]) * 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4, 23, 24, 100])
def test_chunks_change_no_result(bits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "MAX_DEQUANTIZED", rows * 16)
    module, weights = quantised(bits), torch.randn(3, 5, 24)
    x = torch.randn(3, 5, 14, requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out, nn.functional.linear(x, module.dequantized(), module.bias))
    (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ module.dequantized())


def test_a_row_that_is_too_large_alone_is_dequantised_all_the_same(unpacked: list[int]) -> None:
    module = quantised(8, out=3, width=100)
    x = torch.randn(2, 100)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.dequantized(), module.bias))
    assert unpacked == [100] * 3 + [300]  # the last is the reference


def test_chunks_add_up_in_fp32_and_keep_the_dtype(unpacked: list[int]) -> None:
    """A sum of 250 chunks in bf16 would be off by several per cent."""
    module = QuantizedLinear.from_linear(nn.Linear(16, 1000, bias=False), 8, group=16)
    x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    out = module(x)
    grad = torch.ones_like(out)
    out.backward(grad)
    assert len(unpacked) == 500 and out.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    exact = grad.double() @ module.dequantized(torch.bfloat16).double()
    error = (x.grad.double() - exact).abs().max() / exact.abs().max()
    assert float(error) < 0.01


def test_autocast_gives_the_same_dtype_in_chunks(unpacked: list[int]) -> None:
    module, x = quantised(8), torch.randn(2, 14)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16 and len(unpacked) == 6
