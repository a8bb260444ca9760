"""Find the list of repeated blocks of any Hugging Face transformer, by structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.overrides import BLOCK_PATHS
from offsite_fl.models.probe import probe_batch

# timm's plain vision transformers keep their blocks in a Sequential, which calls them one after the other.
BlockList: TypeAlias = nn.ModuleList | nn.Sequential


@dataclass(frozen=True)
class Blocks:
    """Where a model keeps its repeated blocks.

    ``path`` is that of the list inside the model as given, wrappers included (``"model.layers"``), ``depth``
    how many blocks it holds, ``cls`` the name of their class.
    """

    path: str
    depth: int
    cls: str


def find_blocks(model: nn.Module) -> Blocks:
    """Find the longest list of blocks of one class that the forward pass walks through.

    Only the structure is read, so it works on the meta device and under any wrapper (PEFT, DDP). Lists inside a block
    (experts, for one) are part of that block. Where a model has several lists, :data:`BLOCK_PATHS` decides, then what
    the model itself calls its decoder (the stack that writes text, beside an encoder or a vision tower), then a forward
    pass over the smallest batch if the model has weights, then length.

    Raises
    ------
    ModelError
        If no list fits or several fit equally well; the message says what was seen.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, GPT2Config
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=3))
    >>> find_blocks(model)
    Blocks(path='transformer.h', depth=3, cls='GPT2Block')
    """
    lists = dict(_outer_lists(model))
    named = BLOCK_PATHS.get(_model_type(model), "")
    if named:
        fitting = [path for path in lists if path == named or path.endswith(f".{named}")]
        if len(fitting) == 1:
            return _describe(fitting[0], lists[fitting[0]])
    written = _in_decoder(model, lists) or list(lists)
    candidates = {path: lists[path] for path in written if _looks_repeated(lists[path])}
    if not candidates:
        candidates = {path: found for path, found in _sequences(model) if len(found) > 1 and _looks_repeated(found)}
    if len(candidates) > 1:
        walked = _walked(model, candidates)
        candidates = {path: candidates[path] for path in walked} if walked else candidates
    longest = max((len(blocks) for blocks in candidates.values()), default=0)
    best = [path for path, blocks in candidates.items() if len(blocks) == longest]
    if len(best) == 1:
        return _describe(best[0], candidates[best[0]])
    every = {**lists, **candidates}
    seen = ", ".join(f"{path} ({_classes(blocks)})" for path, blocks in every.items()) or "no ModuleList at all"
    what = "several lists of blocks fit equally well" if best else "no list of repeated blocks"
    raise ModelError(
        f"{what} in {type(model).__name__}; seen: {seen}. A transformer should hold its blocks in one nn.ModuleList "
        "or nn.Sequential of one class; for other families add a row to offsite_fl/models/overrides.py"
    )


def block_list(model: nn.Module, blocks: Blocks) -> BlockList:
    """Return the live list that ``blocks`` describes; ``ModelError`` if ``model`` isn't the one it was found in."""
    found = list_at(model, blocks.path)
    if found is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks at {blocks.path!r}")
    if len(found) != blocks.depth:
        raise ModelError(f"{blocks.path!r} holds {len(found)} blocks where {blocks.depth} were expected")
    return found


def list_at(model: nn.Module, path: str) -> BlockList | None:
    """The list of modules at ``path``; None if there is none."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, BlockList) else None


def _outer_lists(module: nn.Module, kinds: Any = nn.ModuleList) -> Iterator[tuple[str, BlockList]]:
    """Yield the non-empty lists of ``kinds`` that lie in no other list, in order of registration."""
    seen: set[int] = set()
    stack = [("", module)]
    while stack:
        name, current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, kinds):
            if len(current):
                yield name, current
            continue
        children = [(f"{name}.{child}" if name else child, value) for child, value in current.named_children()]
        stack.extend(reversed(children))


def _sequences(model: nn.Module) -> list[tuple[str, nn.Sequential]]:
    """The outermost Sequentials; one inside a list, as in a stage of a pyramid, is a part of what the list holds."""
    every = _outer_lists(model, (nn.ModuleList, nn.Sequential))
    return [(path, found) for path, found in every if isinstance(found, nn.Sequential)]


def _looks_repeated(blocks: BlockList) -> bool:
    """Tell blocks from lists of mere layers: one class, made of parts, with at least two weight matrices."""
    first = blocks[0]
    matrices = sum(parameter.ndim >= 2 for parameter in first.parameters())
    nested = isinstance(first, (nn.ModuleList, nn.ModuleDict))  # such a list is never called as a whole
    uniform = len({type(block) for block in blocks}) == 1 and not nested and not _all_differ(blocks)
    return uniform and any(True for _ in first.children()) and matrices >= 2


def _all_differ(blocks: BlockList) -> bool:
    """Whether no two of three or more blocks have tensors of the same shapes: the stages of a pyramid, not a stack."""
    shapes = {tuple((n, t.shape) for n, t in block.state_dict(keep_vars=True).items()) for block in blocks}
    return 2 < len(blocks) == len(shapes)


def _model_type(model: nn.Module) -> str:
    """Return the outermost ``config.model_type`` under any wrapper, or ''."""
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str):
            return kind
    return ""


def _describe(path: str, blocks: BlockList) -> Blocks:
    return Blocks(path, len(blocks), type(blocks[0]).__name__)


def _classes(blocks: BlockList) -> str:
    names = [type(block).__name__ for block in blocks]
    said = " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{said}, no two of the same shapes" if _all_differ(blocks) else said


def _in_decoder(model: nn.Module, lists: dict[str, BlockList]) -> list[str]:
    """Return the lists that lie in the decoder of the outermost model that names one; [] if none does."""
    for module in model.modules():
        getter = getattr(module, "get_decoder", None)
        if callable(getter):
            decoder = getter()
            inside = {id(part) for part in decoder.modules()} if isinstance(decoder, nn.Module) else set()
            return [path for path, blocks in lists.items() if id(blocks) in inside]
    return []


def _walked(model: nn.Module, candidates: dict[str, BlockList]) -> list[str]:
    """Return the candidates whose blocks a small forward pass calls once each, in order; [] if it can't run."""
    if any(tensor.is_meta for tensor in model.parameters()):
        return []  # masks are built with Tensor.item(), which meta tensors don't have
    calls: dict[str, list[int]] = {path: [] for path in candidates}

    def note(path: str, index: int) -> Any:
        return lambda *_: calls[path].append(index)

    handles = [
        block.register_forward_pre_hook(note(path, index))
        for path, blocks in candidates.items()
        for index, block in enumerate(blocks)
    ]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(**probe_batch(model))
    except Exception:  # a model that takes more than one input may fail in any way; length decides then
        return []
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    return [path for path, order in calls.items() if order == list(range(len(candidates[path])))]
