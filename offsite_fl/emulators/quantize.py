"""Quantisation: the weights of every linear in the emulator as packed integers with one scale per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from offsite_fl.config import check, check_choices
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, EmulatorMethod, copy_structure, register
from offsite_fl.emulators.bit_choice import Stage, spend
from offsite_fl.emulators.budget import emulator_bytes, held_against, stored_bytes
from offsite_fl.emulators.weights import refuse_quantized, with_matrices
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import BITS, QuantizedLinear, linear_weight, named_linears, replace_module
from offsite_fl.sizes import parse_bytes

Mode = Literal["packed", "legacy-fake"]
BitsOf = Callable[[int, str], int | None]
"""Bits of the linear at a path of an emulator block, by the block's number; None leaves it as it is."""


@register("quantize")
@dataclass(frozen=True)
class Quantize(EmulatorMethod):
    """Store the emulator's linear weights as packed int8 or int4; norms and biases stay as they are.

    ``bits`` is 8 or 4; with fewer a weight can't stand for the middle any more (at 1 bit a group is a constant).
    ``group`` is the largest number of consecutive inputs of one output that share a scale, 0 gives each output a single
    one; a weight moves by at most half its group's scale, so larger groups lose more. Factors of a low-rank linear are
    quantised one by one. Quantised weights can't be trained, so what trains the emulator (``distill``) comes before.

    With a budget, ``keep`` (a share of the bytes) or ``bytes``, ``bits`` doesn't count: each linear gets 4 bits, and
    those whose relative squared error ``||W - W'||^2 / ||W||^2`` falls most for a byte more get 8, or stay as they are,
    until the budget is spent.

    ``mode=legacy-fake`` is that of the offsite-tuning paper (arXiv 2302.04870), for comparison: every tensor with more
    than one dimension becomes ``round((w - zp) / s) * s + zp`` with ``zp = (max + min) / 2`` and
    ``s = (max - min) / (2^bits - 1)`` and is stored as wide as before, so no bytes are saved. ``bits`` is 1 to 8 there.
    """

    bits: int = 8
    group: int = 64
    mode: Mode = "packed"
    keep: float | None = None
    bytes: str = ""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.mode == "packed":
            known = self.bits in BITS
            check(known, f"quantize bits = {self.bits!r} isn't possible; packed weights have 8 or 4 bits")
        else:
            check(1 <= self.bits <= 8, f"quantize bits = {self.bits!r} isn't possible; legacy-fake takes 1 to 8")
            free = self.keep is None and not self.bytes
            check(free, "quantize: legacy-fake saves no bytes, so it takes no budget; leave out keep and bytes")
        fits = self.group >= 0 and self.group % 2 == 0
        check(fits, f"quantize group must be even and at least 2, or 0 for one scale an output, got {self.group}")
        share = self.keep is None or 0 < self.keep <= 1
        check(share, f"quantize keep = {self.keep!r} must be a share above 0 and at most 1")
        check(not self.bytes or parse_bytes(self.bytes) > 0, f"quantize bytes = {self.bytes!r} must be above 0")

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Copy every block once, without its weights, and pack its linears.

        ``EmulatorError`` if a block holds a linear that is quantised already, or, unless the mode is legacy-fake, none
        at all.
        """
        refuse_quantized(emulator, self.name, "name quantize once in a chain")
        if self.mode == "legacy-fake":
            return self._faked(emulator, context)
        budget = self.budget(emulator)
        if budget is None:
            return self._packed(emulator, context, lambda number, path: self.bits)
        chosen = self._choose(emulator, context, budget)
        built = self._packed(emulator, context, lambda number, path: chosen[f"{number}.{path}"])
        least = "4 bits a weight and their scales are the least that a linear takes"
        why = least if emulator_bytes(built) > budget else "a linear has 4 bits, 8, or stays as it is"
        return held_against(budget, emulator, built, self.name, why)

    def budget(self, emulator: Emulator) -> int | None:
        """Bytes that the result should hold; None without a budget."""
        if self.bytes:
            return parse_bytes(self.bytes)
        return None if self.keep is None else round(self.keep * emulator_bytes(emulator))

    def _packed(self, emulator: Emulator, context: Context, bits_of: BitsOf) -> Emulator:
        blocks = []
        for number, block in enumerate(context.track(emulator.blocks, "quantize", total=len(emulator.blocks))):
            packed = copy_structure(block.module)
            for path, linear, where in _linears(packed, block, number):
                bits = bits_of(number, path)
                if bits is not None:
                    replace_module(packed, path, self._quantized(linear, bits, where))
            blocks.append(EmulatorBlock(packed, block.origin))
        return Emulator(blocks, dict(emulator.layout))

    def _quantized(self, linear: nn.Module, bits: int, where: str) -> QuantizedLinear:
        quantized = QuantizedLinear.from_linear(linear, bits, self._even_group(linear_weight(linear).shape[1]))
        if not torch.isfinite(quantized.scales).all():
            raise EmulatorError(f"quantize: {where} holds weights that aren't finite, or too large for fp16 scales")
        return quantized

    def _even_group(self, inputs: int) -> int:
        """The smallest even group that needs no more scales than ``self.group``, so that little padding is stored."""
        groups = -(-inputs // self.group) if self.group else 1
        size = -(-inputs // groups)
        return size + size % 2

    def _choose(self, emulator: Emulator, context: Context, budget: int) -> dict[str, int | None]:
        """Bits by ``number.path`` of each linear, None where it stays as it is."""
        stages: dict[str, list[Stage[int | None]]] = {}
        fixed = emulator_bytes(emulator)
        for number, block in enumerate(context.track(emulator.blocks, "choose bits", total=len(emulator.blocks))):
            for path, linear, where in _linears(block.module, block, number):
                whole = Stage[int | None](None, stored_bytes([linear]), 0.0)
                packed = [self._stage(linear, bits, where) for bits in sorted(BITS)]
                stages[f"{number}.{path}"] = [*packed, whole]
                fixed -= whole.bytes
        return spend(stages, budget - fixed)

    def _stage(self, linear: nn.Module, bits: int, where: str) -> Stage[int | None]:
        quantized = self._quantized(linear, bits, where)
        weight = linear_weight(linear).detach().float()
        size = float(weight.square().sum())
        error = float((quantized.dequantized() - weight).square().sum())
        return Stage(bits, stored_bytes([quantized]), error / size if size else 0.0)

    def _faked(self, emulator: Emulator, context: Context) -> Emulator:
        tracked = context.track(emulator.blocks, "quantize legacy-fake", total=len(emulator.blocks))
        blocks = [
            EmulatorBlock(with_matrices(block.module, lambda weight: fake_quantized(weight, self.bits)), block.origin)
            for block in tracked
        ]
        note = "quantize: legacy-fake stores its few levels as wide as the weights before, so no bytes are saved"
        return Emulator(blocks, dict(emulator.layout), (note,))


def fake_quantized(weight: Tensor, bits: int) -> Tensor:
    """``weight`` rounded to levels ``s`` apart around the middle of its range, in fp32 and then in its own dtype.

    ``zp = (max + min) / 2``, ``s = (max - min) / (2^bits - 1)``, ``round((w - zp) / s) * s + zp``. The ends of the
    range lie half a level beside a level: one bit leaves a single value, 8 bits can give 257.

    >>> fake_quantized(torch.tensor([[-1.0, 0.2], [0.6, 2.0]]), 2)
    tensor([[-1.5000,  0.5000],
            [ 0.5000,  2.5000]])
    """
    wide = weight.float()
    low, high = wide.min(), wide.max()
    step, middle = (high - low) / float(2**bits - 1), (high + low) / 2
    if step == 0:
        return weight.clone()
    return (((wide - middle) / step).round() * step + middle).to(weight.dtype)


def _linears(module: nn.Module, block: EmulatorBlock, number: int) -> Iterator[tuple[str, nn.Module, str]]:
    """Path and module of every linear, and how messages call it; ``EmulatorError`` if there is none."""
    linears = list(named_linears(module))
    if not linears:
        raise EmulatorError(f"quantize: emulator block {number} ({type(module).__name__}) holds no linear")
    for path, linear in linears:
        yield path, linear, f"{path} of emulator block {number} (from block {block.origin} of the full model)"
