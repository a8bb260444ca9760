"""Whether the blocks that a client builds from a config are like the owner's, told by structure and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import Blocks, block_list
from offsite_fl.models.outside import outside_blocks

# Switches of training only. Everything that drops at random counts as one too, whatever its rate: it runs in no eval.
_TRAINING = {"training", "gradient_checkpointing"}
_PLAIN = (bool, int, float, str, type(None))


def check_alike(model: nn.Module, blocks: Blocks, network: nn.Module, sources: Sequence[int]) -> None:
    """``ModelError`` unless block ``i`` of ``network`` is built like the full model's block ``sources[i]``.

    Compared are the classes of all modules, the names and shapes of all tensors, and all plain settings (a window, a
    kind of attention, a scale), save a block's own index; outside the blocks the names
    and shapes of tensors. ``network`` may lie on the meta device.
    """
    if type(network).__name__ not in {cls.__name__ for cls in type(model).__mro__}:
        raise ModelError(
            f"a client would build {type(network).__name__} from the config where the owner has {type(model).__name__}"
        )
    ours, theirs = outside_blocks(model, blocks.path), outside_blocks(network, blocks.path)
    for name, tensor in theirs.items():
        shape = tuple(ours[name].shape) if name in ours else "none"
        if shape != tuple(tensor.shape):
            raise ModelError(
                f"the config doesn't describe this {type(model).__name__}: {name} has shape {shape} here and "
                f"{tuple(tensor.shape)} in what a client would build from it; write the config anew or load the model "
                "with it"
            )
    built = block_list(network, replace(blocks, depth=len(sources)))
    own = block_list(model, blocks)
    for place, source in enumerate(sources):
        difference = next(_differences(own[source], built[place], source, place), None)
        if difference is not None:
            raise ModelError(_sentence(blocks, source, place, difference))


def _sentence(blocks: Blocks, source: int, place: int, difference: str) -> str:
    start = f"block {source} of the {blocks.depth} at {blocks.path!r} can't run as block {place} of a client's network"
    if source == place:
        return f"{start}: the config makes another block there, {difference}. Load the model as its config says it"
    return (
        f"{start}: in this family a block depends on its index, {difference}. Choose a split or an emulator that "
        f"leaves the first {place + 1} block(s) of the model where they are; first={place + 1} does with any emulator"
    )


def _differences(own: nn.Module, built: nn.Module, source: int, place: int) -> Iterator[str]:
    ours, theirs = dict(own.named_modules()), dict(built.named_modules())
    for path in dict.fromkeys((*ours, *theirs)):
        if "drop" in path.lower():
            continue
        a, b = ours.get(path), theirs.get(path)
        where = path or "the block"
        if a is None or b is None or _class(a) != _class(b):
            yield f"{where} is {_class(a)} here and {_class(b)} there"
        else:
            prefix = f"{path}." if path else ""
            yield from (prefix + said for said in (*_tensors(a, b), *_settings(a, b, source, place)))


def _class(module: nn.Module | None) -> str:
    return "missing" if module is None else type(module).__name__


def _tensors(a: nn.Module, b: nn.Module) -> Iterator[str]:
    """Differences of the tensors that the modules hold themselves; what lies deeper has its own turn."""
    ours, theirs = (
        {n: tuple(t.shape) for n, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))}
        for m in (a, b)
    )
    kept = {*a.state_dict(keep_vars=True), *b.state_dict(keep_vars=True)}
    for name in dict.fromkeys((*ours, *theirs)):
        if name in kept and ours.get(name) != theirs.get(name):
            yield f"{name} has shape {ours.get(name, 'none')} here and {theirs.get(name, 'none')} there"


def _settings(a: nn.Module, b: nn.Module, source: int, place: int) -> Iterator[str]:
    for name, value in vars(a).items():
        other = vars(b).get(name, value)
        if name.startswith("_") or name in _TRAINING or "drop" in name.lower() or not (_plain(value) and _plain(other)):
            continue
        if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)) and len(value) != len(other):
            # A block may keep the whole model's list of kinds; it says something of this block by one entry.
            value, other = value[source : source + 1], other[place : place + 1]
        if value != other and (value, other) != (source, place):
            yield f"{name} = {value!r} here and {other!r} there"


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
