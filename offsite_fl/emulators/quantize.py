"""Quantisation: the weights of every linear in the emulator as packed integers with one scale per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, EmulatorMethod, copy_structure, register
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import QuantizedLinear, linear_weight, named_linears, replace_module


@register("quantize")
@dataclass(frozen=True)
class Quantize(EmulatorMethod):
    """Store the emulator's linear weights as packed int8 or int4; norms and biases stay as they are.

    ``bits`` is 8 or 4; with fewer a weight can't stand for the middle any more (at 1 bit a group is a constant).
    ``group`` is the largest number of consecutive inputs of one output that share a scale, 0 gives each output a single
    one; a weight moves by at most half its group's scale, so larger groups lose more. Factors of a low-rank linear are
    quantised one by one. Quantised weights can't be trained, so what trains the emulator (``distill``) comes before.
    """

    bits: int = 8
    group: int = 64

    def __post_init__(self) -> None:
        check(self.bits in (8, 4), f"quantize bits = {self.bits!r} isn't possible; packed weights have 8 or 4 bits")
        fits = self.group >= 0 and self.group % 2 == 0
        check(fits, f"quantize group must be even and at least 2, or 0 for one scale an output, got {self.group}")

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Copy every block once, without its weights, and pack its linears.

        ``EmulatorError`` if a block holds a linear that is quantised already, or none at all.
        """
        for number, block in enumerate(emulator.blocks):
            _refuse_quantized(block.module, number)
        tracked = context.track(emulator.blocks, "quantize", total=len(emulator.blocks))
        packed = [EmulatorBlock(self._pack(block, number), block.origin) for number, block in enumerate(tracked)]
        return Emulator(packed, dict(emulator.layout))

    def _pack(self, block: EmulatorBlock, number: int) -> nn.Module:
        packed = copy_structure(block.module)
        linears = list(named_linears(packed))
        if not linears:
            raise EmulatorError(f"quantize: emulator block {number} ({type(packed).__name__}) holds no linear")
        for path, linear in linears:
            quantized = QuantizedLinear.from_linear(linear, self.bits, self._even_group(linear_weight(linear).shape[1]))
            if not torch.isfinite(quantized.scales).all():
                raise EmulatorError(
                    f"quantize: {path} of emulator block {number} (from block {block.origin} of the full model) holds "
                    "weights that aren't finite, or too large for fp16 scales"
                )
            replace_module(packed, path, quantized)
        return packed

    def _even_group(self, inputs: int) -> int:
        """The smallest even group that needs no more scales than ``self.group``, so that little padding is stored."""
        groups = -(-inputs // self.group) if self.group else 1
        size = -(-inputs // groups)
        return size + size % 2


def _refuse_quantized(block: nn.Module, number: int) -> None:
    for path, module in block.named_modules():
        if isinstance(module, QuantizedLinear):
            raise EmulatorError(
                f"quantize: {path} of emulator block {number} has {module.bits}-bit weights already; "
                "name quantize once in a chain"
            )
