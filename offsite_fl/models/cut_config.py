"""A model's config for a network of fewer blocks: which of its numbers is the depth is found by trying, not by name."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import Blocks, list_at
from offsite_fl.models.outside import outside_blocks
from offsite_fl.models.overrides import (
    DEPTH_TABLES,
    DERIVED,
    INDEX_DEPENDENT_FLAGS,
    INDEX_LISTS,
    INDEX_TABLES,
    LEADING_COUNTS,
    SECOND_DEPTHS,
)
from offsite_fl.models.tasks import build_model, classes_for

# Never part of a plan: where the model came from, and switches that make transformers fetch or run foreign code.
FORBIDDEN_CONFIG_KEYS = frozenset(
    {
        "auto_map",
        "quantization_config",
        "name_or_path",
        "attn_implementation",
        "experts_implementation",
        "custom_pipelines",
        # What timm's factory takes among a model's arguments besides those of the model itself.
        "cache_dir",
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    }
)
_LEFT_OUT = FORBIDDEN_CONFIG_KEYS | {"transformers_version", "architectures", "dtype", "torch_dtype", *DERIVED}


@dataclass(frozen=True)
class DepthKey:
    """The entry of a config that says how many blocks there are: its name, and the way to the config that holds it.

    ``lists`` says whether lists of that length beside it have one entry a block (in LED they are the encoder's).
    ``table`` is the dictionary in that config that has the entry, or needn't have it (timm's ``model_args``).
    """

    name: str
    inside: tuple[str, ...] = ()
    lists: bool = True
    table: str = ""

    def holder(self, config: PretrainedConfig) -> Any:
        """The part of ``config`` that holds the entry."""
        for name in self.inside:
            config = getattr(config, name)
        return config

    def __str__(self) -> str:
        """Dotted, as in ``text_config.num_hidden_layers``."""
        return ".".join((*self.inside, *((self.table,) if self.table else ()), self.name))


_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[Blocks, DepthKey]] = weakref.WeakKeyDictionary()


def cut_config(model: nn.Module, blocks: Blocks, sources: Sequence[int], task: str) -> dict[str, Any]:
    """The model's config as plain data for a network whose block ``i`` is like the full model's ``sources[i]``.

    Lists with one entry a block are cut to the entries of ``sources``. ``ModelError`` if the config doesn't say how
    many blocks there are, or if blocks depend on their absolute index.
    """
    config = checked_config(model)
    known = _FOUND.get(model)
    if known is None or known[0] != blocks:
        known = (blocks, _find_depth_key(model, config, blocks, task))
        _FOUND[model] = known
    cut = _with_blocks(config, known[1], blocks.depth, sources)
    cut.tie_word_embeddings = _is_tied(model)
    if not cut.tie_word_embeddings and _reads_by_one_embedding(model):
        cut.tie_encoder_decoder = True
    plain: dict[str, Any] = _cleaned(json.loads(cut.to_json_string(use_diff=False)))
    if len(classes_for(task, type(config))) > 1:
        plain["architectures"] = [type(model).__name__]
    return plain


def checked_config(model: nn.Module) -> PretrainedConfig:
    """The config of ``model``, or ``ModelError`` if a client couldn't rebuild the model from it."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"{type(model).__name__} has no transformers config that a client could rebuild it from")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the model was loaded quantized (its config has a quantization_config), and packed weights can be neither "
            "tuned nor compressed: load it in float32 or bfloat16; an emulator can be quantized by quantize:bits=8"
        )
    for flag in INDEX_DEPENDENT_FLAGS:
        if getattr(config, flag, False):
            raise ModelError(
                f"models with {flag}=True can't be split: a block's function depends on its absolute index"
            )
    return config


def _find_depth_key(model: nn.Module, config: PretrainedConfig, blocks: Blocks, task: str) -> DepthKey:
    """The first entry that, made one smaller, makes a model with one block less and all else the same."""
    tried: dict[str, str] = {}
    for likely in _candidates(model, config, blocks):
        for key in (likely, replace(likely, lists=False)):
            wrong = _wrong_with(model, config, blocks, key, task)
            if wrong is None:
                return key
            tried.setdefault(str(key), wrong)
    seen = "; ".join(f"{key}: {reason}" for key, reason in tried.items()) or f"no entry is {blocks.depth}"
    raise ModelError(
        f"the config of {type(model).__name__} has no entry that alone makes {blocks.path} shorter, so no client could "
        f"build a network of fewer blocks ({seen})"
    )


def _wrong_with(model: nn.Module, config: PretrainedConfig, blocks: Blocks, key: DepthKey, task: str) -> str | None:
    """Why ``key`` isn't the depth: what a model with one block less by it is like; None if it is."""
    count = blocks.depth - 1 or 2
    sources = [min(index, blocks.depth - 1) for index in range(count)]
    try:
        with torch.device("meta"):
            trial = build_model(task, _with_blocks(config, key, blocks.depth, sources))
        stack = list_at(trial, blocks.path)
    except Exception as error:  # a number that isn't the depth can break a constructor in any way
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if stack is None or len(stack) != count:
        return f"{blocks.path} stays as it is"
    outside = {name: t.shape for name, t in outside_blocks(model, blocks.path).items()}
    others = {name: t.shape for name, t in outside_blocks(trial, blocks.path).items()}
    changed = next((name for name, shape in others.items() if outside.get(name) != shape), None)
    return None if changed is None else f"{changed} changes with it"


def _candidates(model: nn.Module, config: PretrainedConfig, blocks: Blocks) -> list[DepthKey]:
    """Whole numbers of the config that equal the depth, likely ones first."""
    near = _nearest_config(model, blocks)
    ranked: list[tuple[tuple[bool, bool, bool], DepthKey]] = []
    for inside, part in _parts(config):
        for name, value in part.to_dict().items():
            if type(value) is int and value == blocks.depth and isinstance(vars(part).get(name), int):
                usual = name in ("num_hidden_layers", "n_layer")
                layers = any(word in name for word in ("layer", "block", "depth"))
                ranked.append(((part is not near, not usual, not layers), DepthKey(name, inside)))
    told = [DepthKey(entry, (), False, table) for table, entry in _depth_tables(config)]
    return told + [key for _, key in sorted(ranked, key=lambda pair: pair[0])]


def _depth_tables(config: PretrainedConfig) -> list[tuple[str, str]]:
    """Where :data:`DEPTH_TABLES` says that the depth of such a model is set."""
    return [DEPTH_TABLES[config.model_type]] if config.model_type in DEPTH_TABLES else []


def _nearest_config(model: nn.Module, blocks: Blocks) -> Any:
    """The config of the innermost module around the blocks that has one."""
    parts = blocks.path.split(".")
    for length in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if isinstance(config, PretrainedConfig):
            return config
    return None


def _parts(
    config: PretrainedConfig, inside: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PretrainedConfig]]:
    """``config`` and every config inside it, with the way to each."""
    yield inside, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, (*inside, name))


def _with_blocks(config: PretrainedConfig, key: DepthKey, depth: int, sources: Sequence[int]) -> Any:
    """A copy of ``config`` for blocks like those at ``sources`` of ``depth``."""
    plain = config.to_dict()
    _with_tables(plain, key, sources)
    cut = type(config).from_dict({k: v for k, v in plain.items() if k not in FORBIDDEN_CONFIG_KEYS})
    holder = key.holder(cut)
    values = holder.to_dict()
    if key.table:
        setattr(holder, key.table, {**(values.get(key.table) or {}), key.name: len(sources)})
        return cut
    setattr(holder, key.name, len(sources))
    for name, value in values.items():
        if name in INDEX_LISTS and isinstance(value, (list, tuple)):
            setattr(holder, name, [new for new, old in enumerate(sources) if old in value])
        elif key.lists and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(holder, name, [value[index] for index in sources])
        elif name in LEADING_COUNTS and type(value) is int:
            setattr(holder, name, sum(index < value for index in sources))
        elif name in SECOND_DEPTHS:
            setattr(holder, name, len(sources))
    return cut


def _with_tables(plain: dict[str, Any], key: DepthKey, sources: Sequence[int]) -> None:
    """Give the tables of :data:`INDEX_TABLES` in ``plain`` the indices that the blocks have in the cut network."""
    for name in key.inside:
        plain = plain[name]
    for name in INDEX_TABLES:
        table = {str(index): entry for index, entry in (plain.get(name) or {}).items()}
        if table:
            plain[name] = {str(new): table[str(old)] for new, old in enumerate(sources) if str(old) in table}


def _cleaned(value: Any) -> Any:
    """``value`` without the entries that say where it came from or how it lies in memory, at any depth."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _LEFT_OUT and not k.startswith("_") and not _infinite(v)}
        return {k: _cleaned(v) for k, v in kept.items()}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _infinite(value: Any) -> bool:
    """Whether an entry holds an infinity, which plain JSON can't; left out, it is the family's own default."""
    return (isinstance(value, dict) and "__float__" in value) or (
        isinstance(value, list) and any(_infinite(item) for item in value)
    )


def _reads_by_one_embedding(model: Any) -> bool:
    """Whether encoder and decoder of a model for both have one embedding (Flan-T5, beside a head of its own)."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    weights = {id(getattr(part.get_input_embeddings(), "weight", None)) for part in (model, model.get_encoder())}
    return len(weights) == 1


def _is_tied(model: Any) -> bool:
    """Whether head and embedding really are one tensor, whatever the config says."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return False
    return getattr(head, "weight", None) is getattr(model.get_input_embeddings(), "weight", head)
