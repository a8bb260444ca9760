"""LoRA inside the adapter through ``peft``: put in, read out, take away, merge at the model owner.

The factors carry slot names: ``adapter.{k}.{path of the linear}.lora_A.weight`` [rank, in] and ``.lora_B.weight``
[out, rank]. The product ``alpha / rank * B @ A`` is added to the linear's weight. A head
(:mod:`offsite_fl.models.head`) has no factors: its tensors are trained whole beside them, under their own names, as
peft's ``modules_to_save`` are.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offsite_fl.config import Factors, LoraOptions
from offsite_fl.errors import ConfigError, UpdateError
from offsite_fl.models.head import is_head
from offsite_fl.models.linears import is_named, linear_weight, named_linears, replace_module
from offsite_fl.registry import near

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

A, B = ".lora_A.weight", ".lora_B.weight"  # how the names of the two factors of a linear end

_NAME = "default"  # peft's name for the only set of factors


class AdapterLora:
    """LoRA factors that live in the adapter blocks of a network until :meth:`remove`; made by :func:`add_lora`."""

    def __init__(
        self, blocks: Mapping[int, nn.Module], options: LoraOptions, seed: int, head: Mapping[str, nn.Parameter]
    ) -> None:
        self.blocks = dict(sorted(blocks.items()))
        self.head = dict(head)
        self._head_before = {name: parameter.detach().clone() for name, parameter in head.items()}
        self.options = options
        self._required = [(p, p.requires_grad) for block in self.blocks.values() for p in block.parameters()]
        self._layers: dict[str, LoraLayer] = {}
        for slot, paths in target_paths(self.blocks, options).items():
            block = self.blocks[slot]
            _inject(block, paths, options)
            for path in paths:
                self._layers[f"adapter.{slot}.{path}"] = cast("LoraLayer", block.get_submodule(path))
        self._start(seed)

    def _start(self, seed: int) -> None:
        # A generator of its own, so that all parties begin with the same factors whatever else drew random numbers.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self._factors().items():
                parameter.data = parameter.data.float()
                if name.endswith(B):
                    parameter.zero_()
                else:
                    parameter.copy_(drawn(parameter.shape[0], parameter.shape[1], generator))
                parameter.requires_grad_(True)

    def _factors(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{factor}.weight": getattr(layer, factor)[_NAME].weight
            for name, layer in self._layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def parameters(self, train: Factors = "both") -> dict[str, nn.Parameter]:
        """What is trained, by slot name: both factors of every linear, or all A, or all B; and the head."""
        live = self._factors() | self.head
        return {name: live[name] for name in trained_names(live, train)}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the factors and the head, fp32 on the CPU."""
        return factors_of(self.parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all factors and the head; ``UpdateError`` names what is missing, unknown or wrong and changes nothing."""
        set_factors(self.parameters(), tensors)

    def remove(self) -> None:
        """Give the network back as it was: the same modules, the same parameters, no trace of peft."""
        for name, layer in self._layers.items():
            _, slot, path = name.split(".", 2)
            replace_module(self.blocks[int(slot)], path, layer.get_base_layer())
        self._layers.clear()
        for block in self.blocks.values():
            block.__dict__.pop("peft_config", None)
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        with torch.no_grad():
            for name, value in self._head_before.items():
                self.head[name].copy_(value)


def drawn(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """An A [rank, columns] to begin with, fp32: Kaiming with a = sqrt(5), as nn.Linear and peft have it."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def factors_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of live factors, fp32 on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}


def set_factors(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` into all live factors; ``UpdateError`` names one that is wrong, and nothing is changed."""
    check_factors({name: tuple(p.shape) for name, p in parameters.items()}, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def add_lora(
    blocks: Mapping[int, nn.Module],
    options: LoraOptions,
    seed: int = 0,
    head: Mapping[str, nn.Parameter] | None = None,
) -> AdapterLora:
    """Put LoRA factors into the adapter blocks (adapter slot -> block), in place.

    The network computes the same as before, since every B is zero. Base weights of the blocks stop requiring
    gradients; ``head``, parameters by slot name, is trained whole beside the factors. ``ConfigError`` if a target names
    no linear of the blocks, with the names that exist.
    """
    return AdapterLora(blocks, options, seed, head or {})


def merge_lora(
    blocks: Mapping[int, nn.Module], factors: Mapping[str, Tensor], options: LoraOptions
) -> dict[str, Tensor]:
    """Full adapter values by slot name, fp32 on the CPU, with ``factors`` merged by peft; ``blocks`` stay as they are.

    Tensors of a head among the factors are among the values as they are. ``UpdateError`` if the others aren't exactly
    those that ``options`` make in these blocks.
    """
    head = {name: tensor for name, tensor in factors.items() if is_head(name)}
    copies = {slot: copy.deepcopy(block).float() for slot, block in blocks.items()}
    lora = AdapterLora(copies, options, 0, {})
    lora.load({name: tensor for name, tensor in factors.items() if name not in head})
    for layer in lora._layers.values():
        layer.merge(safe_merge=True)
    lora.remove()
    merged = {
        f"adapter.{slot}.{path}": parameter.detach().cpu()
        for slot, block in copies.items()
        for path, parameter in block.named_parameters()
    }
    return merged | factors_of(head)


def trained_names(names: Iterable[str], train: Factors) -> list[str]:
    """Those of the factors' ``names`` that ``train`` asks for, in their order; a head is always among them."""
    endings = {"both": ("",), "a": (A,), "b": (B,)}[train]
    return [name for name in names if name.endswith(endings) or is_head(name)]


def unmoved(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What factors and a head are differences from, where ``values`` are those of the start: zeros, and the head."""
    return {name: value if is_head(name) else torch.zeros_like(value) for name, value in values.items()}


def first_components(factors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first ``rank`` rows of every A [r, in] and columns of every B [out, r]: a part of the sum that B A is."""

    def part(name: str, tensor: Tensor) -> Tensor:
        return tensor if is_head(name) else tensor[:rank] if name.endswith(A) else tensor[:, :rank]

    return {name: part(name, tensor) for name, tensor in factors.items()}


def padded(factors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Factors with zeros added behind up to ``rank``; their products are the same."""

    def grown(name: str, tensor: Tensor) -> Tensor:
        if is_head(name):
            return tensor
        missing = rank - tensor.shape[0 if name.endswith(A) else 1]
        return nn.functional.pad(tensor, (0, 0, 0, missing) if name.endswith(A) else (0, missing))

    return {name: grown(name, tensor) for name, tensor in factors.items()}


def added(
    values: Mapping[str, Tensor], factors: Mapping[str, Tensor], targets: Mapping[str, bool], scale: float
) -> dict[str, Tensor]:
    """Full adapter values with ``scale * B A`` added to each target's weight, and the head that came with the factors.

    ``values`` stay as they are. What :func:`merge_lora` does for values that aren't in any network. ``targets``: see
    :func:`target_weights`.
    """
    merged = dict(values) | {name: tensor for name, tensor in factors.items() if is_head(name)}
    for name, flipped in targets.items():
        linear = name.removesuffix(".weight")
        product = scale * (factors[linear + B] @ factors[linear + A])
        merged[name] = values[name] + (product.T if flipped else product)
    return merged


def target_weights(blocks: Mapping[int, nn.Module], options: LoraOptions) -> dict[str, bool]:
    """Slot names of the weights that get factors, and whether each is stored [in, out] as GPT-2 does.

    For those the product that is added is (B A)^T.
    """
    return {
        f"adapter.{slot}.{path}.weight": isinstance(blocks[slot].get_submodule(path), Conv1D)
        for slot, paths in target_paths(blocks, options).items()
        for path in paths
    }


def target_paths(blocks: Mapping[int, nn.Module], options: LoraOptions) -> dict[int, list[str]]:
    """Adapter slot -> paths of the linears inside the block that get factors.

    A target matches as in peft: the whole path or its end (``q_proj`` for ``self_attn.q_proj``). No targets mean all.
    """
    found: dict[int, list[str]] = {}
    known: dict[str, None] = {}
    unused = set(options.targets)
    for slot, block in sorted(blocks.items()):
        paths = [path for path, _ in named_linears(block)]
        known |= dict.fromkeys(paths)
        hits = {t: [path for path in paths if is_named(path, t)] for t in options.targets}
        unused -= {target for target, matched in hits.items() if matched}
        wanted = {path for matched in hits.values() for path in matched}
        found[slot] = [path for path in paths if path in wanted or not options.targets]
    if unused:
        names = dict.fromkeys(path.rpartition(".")[2] for path in known)
        raise ConfigError(f"lora target {min(unused)!r} isn't in the adapter; {near(min(unused), names)}")
    if not any(found.values()):
        raise ConfigError("the adapter blocks hold no linear layer that LoRA could be added to")
    return found


def expected_factors(blocks: Mapping[int, nn.Module], options: LoraOptions) -> dict[str, tuple[int, int]]:
    """Names and shapes of the factors that :func:`add_lora` makes, in its order, worked out without making them."""
    shapes: dict[str, tuple[int, int]] = {}
    for slot, paths in target_paths(blocks, options).items():
        for path in paths:
            rows, columns = linear_weight(blocks[slot].get_submodule(path)).shape
            name = f"adapter.{slot}.{path}"
            shapes |= {name + A: (options.rank, columns), name + B: (rows, options.rank)}
    return shapes


def check_rank(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """``ConfigError`` if factors of these shapes have a rank that no matrix among their products can have."""
    linears = [name.removesuffix(A) for name in shapes if name.endswith(A)]
    rank = max(shapes[name + A][0] for name in linears)
    most = max(min(shapes[name + A][1], shapes[name + B][0]) for name in linears)
    if rank > most:
        raise ConfigError(
            f"lora-rank = {rank} is more than any of the adapter's linears can have: set it to {most} or less"
        )


def check_factors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """``UpdateError`` unless factors and head are exactly the expected ones, of their shapes and finite."""
    for kind, names in (("missing", expected.keys() - tensors.keys()), ("unknown", tensors.keys() - expected.keys())):
        if names:
            raise UpdateError(f"{kind} {_called(min(names))} ({len(names)} in all)")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UpdateError(f"{_called(name)} has shape {tuple(tensors[name].shape)}, must be {shape}")
        if not tensors[name].isfinite().all():
            raise UpdateError(f"{_called(name)} holds values that aren't finite")


def _called(name: str) -> str:
    return f"{'tensor of the head' if is_head(name) else 'LoRA factor'} {name!r}"


def _inject(block: nn.Module, paths: list[str], options: LoraOptions) -> None:
    if not paths:
        return
    # Here, not above: peft takes a second to import, which every message of a deployment would pay, LoRA or not.
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft divides it, any number will do
        lora_dropout=options.dropout,
        target_modules="|".join(re.escape(path) for path in paths),  # matched whole, so no other path can slip in
        fan_in_fan_out=all(isinstance(block.get_submodule(path), Conv1D) for path in paths),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, block, _NAME)
