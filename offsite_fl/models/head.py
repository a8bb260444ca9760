"""The head: tensors outside the blocks that are trained with the adapter and travel with it, as a classifier's do.

Offsite-Tuning's vision models (arXiv 2302.04870, section 4.1) train the classifier with the adapter. On the wire, in
bundles and in updates a tensor of the head is ``adapter.head.{path}``, beside ``adapter.{slot}.{path}`` of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.outside import outside_blocks
from offsite_fl.models.overrides import HEADS
from offsite_fl.models.tasks import CLASSIFICATION
from offsite_fl.registry import near

HEAD = "adapter.head."
MAX_HEAD = 256
Head: TypeAlias = Literal["auto", "none"] | Sequence[str]


def is_head(name: str) -> bool:
    """Whether a slot name is that of a tensor of the head."""
    return name.startswith(HEAD)


def choose_head(model: nn.Module, blocks_path: str, task: str, head: Head = "auto") -> tuple[str, ...]:
    """Paths of the parameters that are the head of ``model``, in the model's order.

    ``"auto"``: for the two classification tasks the parameters outside the base model that transformers names (so
    ``classifier``, ``score``, ``pre_classifier``, but not a pooler that belongs to the base model), for all others
    none. ``"none"``: no tensor outside the blocks is trained. Or paths of parameters, or of modules that stand for all
    their parameters.

    Raises
    ------
    ModelError
        If a path names nothing outside the blocks, a tensor of the head is tied to another one, or nothing lies
        outside the base model.
    """
    if head == "none":
        return ()
    if head == "auto":
        return _outside_base(model, blocks_path) if task in CLASSIFICATION else ()
    given = [head] if isinstance(head, str) else list(head)
    free = _free_parameters(model, blocks_path)
    chosen: set[str] = set()
    for path in given:
        found = {name for name in free if name == path or name.startswith(path + ".")}
        if not found:
            known = [*free, *dict.fromkeys(name.rpartition(".")[0] for name in free)]
            raise ModelError(f"head: {path!r} is no parameter outside the blocks; {near(path, known)}")
        chosen |= found
    names = tuple(name for name in free if name in chosen)
    check_head(model, blocks_path, names)
    return names


def _outside_base(model: nn.Module, blocks_path: str) -> tuple[str, ...]:
    base = f"{getattr(model, 'base_model_prefix', '')}."
    free = _free_parameters(model, blocks_path)
    named = HEADS.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    own = tuple(f"{path}." for path in named)
    names = tuple(name for name in free if (name.startswith(own) if own else not name.startswith(base)))
    if not names or len(names) == len(free):
        raise ModelError(
            f"{type(model).__name__} has no head outside its base model {base[:-1]!r} that could be trained: give "
            "num_labels when the model is made, name the head's parameters, or set head = 'none'"
        )
    check_head(model, blocks_path, names)
    return names


def _free_parameters(model: nn.Module, blocks_path: str) -> list[str]:
    parameters = {id(p) for p in model.parameters()}
    return [name for name, t in outside_blocks(model, blocks_path).items() if id(t) in parameters]


def check_head(model: nn.Module, blocks_path: str, head: Sequence[str]) -> None:
    """``ModelError`` unless ``head`` names parameters outside the blocks, each once, none of them tied to another."""
    outside = outside_blocks(model, blocks_path)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path in head:
        tensor = outside.get(path)
        if tensor is None or id(tensor) not in names or not tensor.is_floating_point():
            raise ModelError(f"head: {path!r} is no parameter outside the blocks of {type(model).__name__}")
        ties = [name for name in names[id(tensor)] if name != path]
        if ties:
            raise ModelError(
                f"head: {path!r} is tied to {ties[0]!r}: training it would change both, so it can't be part of the head"
            )


def head_parameters(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Parameter]:
    """``adapter.head.{path}`` to the live parameter, for each path of ``head``."""
    return {HEAD + path: model.get_parameter(path) for path in head}


def by_slot_names(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Parameter]:
    """All parameters of a model that is tuned whole; the ``head`` has slot names, by which its learning rate goes."""
    return {HEAD + name if name in head else name: p for name, p in model.named_parameters()}


def slot_of_outside(path: str, head: Sequence[str]) -> str:
    """The slot name of a tensor outside the blocks: of the head, or shared."""
    return (HEAD if path in head else "shared.") + path


def read_head(data: object) -> tuple[str, ...]:
    """The head of a foreign network plan; ``ModelError`` if it isn't a short list of distinct names."""
    good = isinstance(data, list) and 1 <= len(data) <= MAX_HEAD and all(isinstance(p, str) for p in data)
    if not isinstance(data, list) or not good or len(set(data)) != len(data):
        raise ModelError(f"network plan: head must be a list of 1 to {MAX_HEAD} different names of parameters")
    return tuple(data)
