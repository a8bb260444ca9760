"""The closed table of what a linear inside an emulator block, or the whole block, can be replaced with.

A client rebuilds an emulator from descriptions of these kinds and from nothing else, so a bundle never brings code:

* ``low-rank``: two factors, ``W ~ up @ down``; either factor may itself be quantised;
* ``quantized``: packed int8 or int4 with a scale per group of input columns;
* ``resized``: an ordinary dense linear of another shape;
* ``harmonizer``: a small network in place of the whole block (:mod:`offsite_fl.models.harmonizer`), under the path "";
  its own linears may be replaced in turn.

A low-rank or quantized linear that stands for a dense one of another shape (pruned before) says so by ``resized``.

Weights are always in the orientation of ``nn.Linear``, [out, in]; GPT-2's ``Conv1D`` (stored [in, out]) counts as a
linear and becomes an ``nn.Linear`` or one of the above when a method replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from offsite_fl.errors import ModelError
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.registry import near

Description = dict[str, Any]

MAX_FEATURES = 2**24
# Items of the tuple that a block returns; the blocks of transformers return two or three.
MAX_RETURNS = 8
BITS = {8: torch.int8, 4: torch.uint8}
# Elements of a packed weight that are dequantised at a time, 16 MB in fp32; at least one row is.
MAX_DEQUANTIZED = 2**22


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a dense linear map with a weight matrix (``nn.Linear`` or ``Conv1D``).

    A subclass with a forward of its own counts if that is a linear's (Falcon's is, Phi-3.5-MoE's router isn't).
    """
    cls: Any = type(module)
    return isinstance(module, (nn.Linear, Conv1D)) and _is_dense(cls)


@cache
def _is_dense(cls: type[nn.Module]) -> bool:
    if cls.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    tried = nn.utils.skip_init(nn.Linear, 3, 2)  # type: ignore[no-untyped-call]  # no random number is drawn
    tried.weight.data, tried.bias.data = torch.arange(6.0).view(2, 3), torch.tensor([1.0, -1.0])
    x = torch.tensor([[1.0, 2.0, -1.0]])
    try:
        tried.__class__ = cls
        with torch.no_grad():
            out = tried(x)
    except Exception:  # a forward that needs more than a weight and a bias may fail in any way
        return False
    # x W' + b by hand: 0 + 2 - 2 + 1 = 1 and 3 + 8 - 5 - 1 = 5
    return isinstance(out, torch.Tensor) and torch.equal(out, torch.tensor([[1.0, 5.0]]))


def linear_weight(module: nn.Module) -> torch.Tensor:
    """Weight of a dense linear as a view of shape [out, in]."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def linear_bias(module: nn.Module) -> torch.Tensor | None:
    """Bias [out] of a dense linear, or None."""
    bias = module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias


def named_linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All dense linears inside ``block`` with their paths, factors of low-rank ones included."""
    for path, module in block.named_modules():
        if is_linear(module):
            yield path, module


def is_named(path: str, target: str) -> bool:
    """Whether ``target`` means the linear at ``path``, as in peft: by its whole path in the block, or by its end."""
    return path == target or path.endswith("." + target)


def replace_module(block: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where ``block.get_submodule(path)`` is."""
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent) if parent else block, name, new)


class LowRankLinear(nn.Module):
    """``y = up(down(x))``: a linear of rank ``rank`` held as two factors, ``rank * (in + out)`` parameters."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down: nn.Module = nn.Linear(in_features, rank, bias=False, device=device)
        self.up: nn.Module = nn.Linear(rank, out_features, bias=bias, device=device)

    @classmethod
    def from_factors(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> LowRankLinear:
        """Wrap ``up`` [out, rank] and ``down`` [rank, in] (and a bias [out]) without copying them."""
        new = cls(down.shape[1], up.shape[0], up.shape[1], bias is not None, device="meta")
        new.down.weight = nn.Parameter(down.contiguous(), requires_grad=False)
        new.up.weight = nn.Parameter(up.contiguous(), requires_grad=False)
        if bias is not None:
            new.up.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return new

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [out, in] that the factors stand for: some families (Mamba, T5) read a weight besides calling."""
        up, down = (
            part.dequantized() if isinstance(part, QuantizedLinear) else linear_weight(part)
            for part in (self.up, self.down)
        )
        return up @ down

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [out] of the second factor, or None."""
        found: torch.Tensor | None = self.up.bias  # type: ignore[assignment]
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        out: torch.Tensor = self.up(self.down(x))
        return out


class QuantizedLinear(nn.Module):
    """A frozen linear with packed symmetric integer weights and one fp16 scale per row and group of columns.

    ``packed`` is int8 [out, columns] for 8 bits, uint8 [out, columns / 2] for 4 bits (two columns a byte, low nibble
    first, values offset by 8); ``scales`` is fp16 [out, groups]. Levels are -(2^(bits-1)-1) .. 2^(bits-1)-1. The
    dequantised weight lives only inside a forward or backward call, a large one in chunks of rows: autograd keeps the
    packed form.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bits not in BITS:
            raise ModelError(f"quantized linear: bits must be 8 or 4, got {bits}")
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        groups = -(-in_features // group)
        columns = groups * group // (8 // bits)
        if groups * group % (8 // bits):
            raise ModelError(f"quantized linear: a group of {group} columns can't be packed at {bits} bits")
        self.register_buffer("packed", torch.empty(out_features, columns, dtype=BITS[bits], device=device))
        self.register_buffer("scales", torch.empty(out_features, groups, dtype=torch.float16, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Module, bits: int, group: int) -> QuantizedLinear:
        """Quantise a dense linear to the nearest level; the error of a weight is at most half its group's scale."""
        weight, bias = linear_weight(linear).detach().float(), linear_bias(linear)
        out_features, in_features = weight.shape
        new = cls(in_features, out_features, bits, group, bias is not None, device="meta")
        groups = -(-in_features // group)
        padded = nn.functional.pad(weight, (0, groups * group - in_features)).view(out_features, groups, group)
        top = 2 ** (bits - 1) - 1
        scales = _half_not_below(padded.abs().amax(dim=-1) / top)
        levels = (padded / scales.float().unsqueeze(-1)).round().clamp(-top, top).view(out_features, -1)
        if bits == 8:
            new.packed = levels.to(torch.int8)
        else:
            nibbles = (levels + 8).to(torch.uint8)
            new.packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        new.scales = scales
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return new

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight [out, in] in fp32: some families (Mamba, T5) read a weight besides calling."""
        return self.dequantized()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the packed form stands for."""
        return _unpack(self.packed, self.scales, self.bits, self.group, self.in_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        out: torch.Tensor = _QuantizedMatmul.apply(  # type: ignore[no-untyped-call]
            x, self.packed, self.scales, self.bits, self.group, self.in_features
        )
        return out if self.bias is None else out + self.bias.to(out.dtype)


def _half_not_below(scales: torch.Tensor) -> torch.Tensor:
    """Positive fp16 scales, rounded up: a scale rounded down would clip the largest weight of a small-valued group.

    The levels are chosen for the rounded scale, the one that is stored. The floor is fp16's smallest subnormal.
    """
    rounded = scales.clamp(min=2.0**-24).half()
    # Neighbouring positive floats are neighbouring integers.
    return (rounded.view(torch.int16) + (rounded.float() < scales)).view(torch.float16)


def _unpack(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, group: int, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    nibbles = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    levels = nibbles.to(dtype) - (0 if bits == 8 else 8)
    weight = levels.view(packed.shape[0], -1, group) * scales.to(dtype).unsqueeze(-1)
    return weight.flatten(1)[:, :in_features]


class _QuantizedMatmul(torch.autograd.Function):
    """``x @ W.T`` that saves the packed weight for backward instead of the dequantised one.

    Of a large weight only a chunk of rows (outputs) is dequantised at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bits: int, group: int, width: int
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape = (bits, group, width, x.dtype)
        chunks = _chunks(packed, scales, group)
        out = [nn.functional.linear(x, _unpack(packed[c], scales[c], bits, group, width, x.dtype)) for c in chunks]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        bits, group, width, dtype = ctx.shape
        chunks = _chunks(packed, scales, group)
        total: torch.Tensor | None = None
        for c in chunks:
            part = grad[..., c] @ _unpack(packed[c], scales[c], bits, group, width, grad.dtype)
            if len(chunks) > 1:  # sums of several parts would lose digits in half precision
                part = part.to(torch.promote_types(part.dtype, torch.float32))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.to(dtype), None, None, None, None, None


def _chunks(packed: torch.Tensor, scales: torch.Tensor, group: int) -> list[slice]:
    """Runs of rows that may be dequantised at a time."""
    rows = max(1, MAX_DEQUANTIZED // (scales.shape[1] * group))
    return [slice(start, start + rows) for start in range(0, len(packed), rows)]


def describe_linears(block: nn.Module, reference: nn.Module) -> dict[str, Description]:
    """What a client must replace in a fresh block like ``reference`` to get the structure of ``block``.

    Keys are module paths, parents before children; the block itself has the path "". An untouched block gives an empty
    table.
    """
    found: dict[str, Description] = {}
    if isinstance(block, Harmonizer):
        found[""] = {"kind": "harmonizer", "in": block.features, "rank": block.rank, "returns": block.returns}
        reference = _harmonizer(found[""], reference)
    original = dict(reference.named_modules())
    for path, module in block.named_modules():
        entry = _entry(module, original.get(path))
        if entry is not None:
            found[path] = entry
    return found


def _entry(module: nn.Module, original: nn.Module | None) -> Description | None:
    """Description of one module that stands where the reference has ``original``; None if there is nothing to say."""
    if isinstance(module, LowRankLinear):
        bias = getattr(module.up, "bias", None) is not None
        entry = {"kind": "low-rank", **_sizes(module), "rank": module.rank, "bias": bias}
    elif isinstance(module, QuantizedLinear):
        sizes = {**_sizes(module), "bits": module.bits, "group": module.group}
        entry = {"kind": "quantized", **sizes, "bias": module.bias is not None}
    elif isinstance(module, nn.Linear) and original is not None and not _same_dense(module, original):
        return {"kind": "resized", **_sizes(module), "bias": module.bias is not None}
    else:
        return None
    if original is not None and is_linear(original):
        fits = (entry["out"], entry["in"]) == tuple(linear_weight(original).shape)
        entry |= {} if fits else {"resized": True}
    return entry


def _sizes(module: nn.Module) -> Description:
    return {"in": module.in_features, "out": module.out_features}


def _same_dense(a: nn.Linear, b: nn.Module) -> bool:
    return isinstance(b, nn.Linear) and a.weight.shape == b.weight.shape and (a.bias is None) == (b.bias is None)


_FIELDS = {
    "low-rank": {"in", "out", "rank", "bias"},
    "quantized": {"in", "out", "bits", "group", "bias"},
    "resized": {"in", "out", "bias"},
    "harmonizer": {"in", "rank", "returns"},
}


def apply_linears(block: nn.Module, description: Mapping[str, Description], width: int | None = None) -> nn.Module:
    """Rebuild in ``block`` the structure that :func:`describe_linears` found; new weights are empty, on meta.

    Returns the block to use: ``block`` itself, or the harmonizer that takes its place. ``width`` is the size of the
    network's hidden state, where it is known. ``ModelError`` names the path of an entry that is malformed or names
    nothing that can be replaced.
    """
    for path in sorted(description, key=lambda p: p.count(".") if p else -1):
        entry = description[path]
        check_description(path, entry)
        if entry["kind"] == "harmonizer":
            if width is not None and entry["in"] != width:
                raise ModelError(f"block description: a harmonizer of {entry['in']} features, the blocks have {width}")
            block = _harmonizer(entry, block)
            continue
        try:
            old = block.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"block description names {path!r}, which this kind of block doesn't have") from error
        if not is_linear(old):
            raise ModelError(f"block description wants to replace {path!r}, which isn't a linear layer")
        out_features, in_features = linear_weight(old).shape
        free = entry["kind"] == "resized" or "resized" in entry
        if not free and (entry["in"], entry["out"]) != (in_features, out_features):
            raise ModelError(f"block description of {path!r} has sizes {entry['in']}x{entry['out']}, not the block's")
        replace_module(block, path, _make(entry))
    return block


def check_description(path: str, entry: Mapping[str, Any]) -> None:
    """Check one entry's kind, fields and ranges before anything is built from it."""
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ModelError(f"block description of {path!r}: unknown kind {kind!r}; {near(str(kind), _FIELDS)}")
    optional = {"resized"} if kind in ("low-rank", "quantized") else set()
    if set(entry) - optional != _FIELDS[kind] | {"kind"}:
        raise ModelError(f"block description of {path!r}: a {kind} entry has fields {sorted(_FIELDS[kind])}")
    if kind == "harmonizer" and path:
        raise ModelError(f"block description of {path!r}: a harmonizer replaces a whole block, whose path is ''")
    for key, value in entry.items():
        if key == "kind":
            continue
        least, most = (0, MAX_RETURNS) if key == "returns" else (1, MAX_FEATURES)
        if key in ("bias", "resized"):
            fits = isinstance(value, bool) and (value or key == "bias")
        else:
            fits = type(value) is int and least <= value <= most
        if not fits:
            raise ModelError(f"block description of {path!r}: {key} = {value!r} is out of range")


def _harmonizer(entry: Mapping[str, Any], block: nn.Module) -> Harmonizer:
    return Harmonizer.replacing(block, entry["in"], entry["rank"], entry["returns"], device="meta")


def _make(entry: Mapping[str, Any]) -> nn.Module:
    sizes = (entry["in"], entry["out"])
    if entry["kind"] == "low-rank":
        return LowRankLinear(*sizes, entry["rank"], entry["bias"], device="meta")
    if entry["kind"] == "quantized":
        return QuantizedLinear(*sizes, entry["bits"], entry["group"], entry["bias"], device="meta")
    return nn.Linear(*sizes, bias=entry["bias"], device="meta")
