"""Settings as frozen dataclasses, checked when made, and the one place that builds them from text.

Flower run configs, message configs and the command line all carry flat ``key = scalar`` tables with dotted
kebab-case keys. :func:`from_mapping` turns such a table into a dataclass and back (:func:`to_mapping`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from offsite_fl.errors import ConfigError
from offsite_fl.registry import near

Scalar = str | int | float | bool
CACHE_VARIABLE = "OFFSITE_FL_CACHE"
FrozenDtype = Literal["auto", "float32", "bfloat16", "float16"]
LossOn = Literal["all", "answer"]
Augment = Literal["none", "flip", "crop-flip"]
Factors = Literal["both", "a", "b"]
C = TypeVar("C")


def check(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def check_choices(config: Any) -> None:
    """Raise ``ConfigError`` where a dataclass holds a value that its ``Literal`` annotation doesn't list."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            _choice(getattr(config, name), typing.get_args(hint), kebab(name))


@dataclass(frozen=True)
class LoraOptions:
    """LoRA inside the adapter, through the ``peft`` library.

    ``targets`` are names of linear modules inside a block as peft takes them (``"q_proj"``); empty means every linear.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"lora rank must be at least 1, got {self.rank}")
        check(self.alpha > 0, f"lora alpha must be above 0, got {self.alpha}")
        check(0 <= self.dropout < 1, f"lora dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class TuneConfig:
    """How a data owner tunes the adapter. Lengths are optimiser steps unless said otherwise.

    ``schedule_steps`` and ``schedule_offset`` let one learning-rate schedule span the rounds of a federation: the
    schedule is laid over ``schedule_steps`` and this call begins at ``schedule_offset`` (None: this call alone).
    ``lora_rank=0`` tunes the whole adapter, above 0 only LoRA factors inside it. ``lora_train`` says which of the two
    factors are trained; the other one stays as it was received. ``lora_fresh`` begins each call with new factors on top
    of the adapter as it was received, to be merged into it afterwards. ``proximal_mu`` adds
    ``mu / 2 * ||A - A_received||^2`` as FedProx does.
    ``head_lr_scale`` multiplies the learning rate of a classifier's head, which Offsite-Tuning's vision models train at
    10 times that of the adapter (arXiv 2302.04870). ``augment``: training images are mirrored ("flip"), or cropped at
    random and mirrored ("crop-flip").
    ``device=None`` lets accelerate choose. ``frozen_dtype`` is the dtype of everything that isn't trained ("auto":
    bf16 on CUDA, the bundle's own floating dtype upcast to fp32 on CPU, where bf16 is slow); trained tensors are fp32.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    lr: float = 1e-4
    batch_size: int = 4
    gradient_accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    schedule_steps: int | None = None
    schedule_offset: int = 0
    clip_norm: float = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    frozen_dtype: FrozenDtype = "auto"
    gradient_checkpointing: bool = False
    block_size: int = 128
    loss_on: LossOn = "all"
    head_lr_scale: float = 1.0
    augment: Augment = "none"
    proximal_mu: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    lora_train: Factors = "both"
    lora_fresh: bool = False
    validation_share: float = 0.0
    eval_every: int | None = None
    patience: int | None = None
    seed: int = 0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("epochs", "lr", "head_lr_scale"):
            value = getattr(self, name)
            check(value > 0 and math.isfinite(value), f"{kebab(name)} must be a number above 0, got {value}")
        for name in ("batch_size", "gradient_accumulation"):
            check(getattr(self, name) >= 1, f"{kebab(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "schedule_steps", "eval_every"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{kebab(name)} must be at least 1 where it is given, got {value}")
        check(self.block_size >= 2, f"block-size must be at least 2 tokens, got {self.block_size}")
        for name in ("weight_decay", "warmup_steps", "schedule_offset", "proximal_mu", "clip_norm"):
            check(getattr(self, name) >= 0, f"{kebab(name)} can't be negative, got {getattr(self, name)}")
        check(0 <= self.seed < 2**63, f"seed must be 0 or above and fit 64 bits, got {self.seed}")
        check(0 <= self.validation_share < 1, f"validation-share must lie in [0, 1), got {self.validation_share}")
        if self.patience is not None:
            check(self.patience >= 1, f"patience must be at least 1, got {self.patience}")
        self._check_lora()

    def _check_lora(self) -> None:
        _ = self.lora
        if self.lora_rank == 0:
            check(self.lora_train == "both", f"lora-train = {self.lora_train!r} needs a lora-rank above 0")
            check(not self.lora_fresh, "lora-fresh needs a lora-rank above 0")
        # Of fresh factors B is zero, so A alone gets no gradient, and what an untrained A was the server can't know.
        check(not self.lora_fresh or self.lora_train == "both", "lora-fresh trains both factors: leave out lora-train")

    @property
    def lora(self) -> LoraOptions | None:
        """The LoRA part of the settings, None when the whole adapter is tuned."""
        if self.lora_rank == 0:
            return None
        return LoraOptions(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)

    @property
    def kept_lora(self) -> LoraOptions | None:
        """The LoRA options of what is kept from one call to the next: None where that is a full adapter.

        Which it is without LoRA, and with ``lora_fresh``, whose factors are merged after each call.
        """
        return None if self.lora_fresh else self.lora

    def without_lora(self) -> TuneConfig:
        """The same settings for tuning whole tensors."""
        return dataclasses.replace(self, lora_rank=0, lora_train="both", lora_fresh=False)


def cache_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The cache's folder: ``root``, else ``OFFSITE_FL_CACHE``, else ``~/.cache/offsite-fl``. It need not exist."""
    chosen = root or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "offsite-fl"
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def kebab(name: str) -> str:
    """Python field name to the key used in TOML and on the command line."""
    return name.replace("_", "-")


def read_spec(part: str, kind: str, spec: str) -> tuple[str, dict[str, str]]:
    """Name and options of ``name:key=value,key=value``, which is ``spec`` or a part of it, a ``kind`` of thing.

    ``ConfigError`` names what isn't an option, and a key that is given twice.

    >>> read_spec("scale:factor=10", "attack", "sign-flip+scale:factor=10")
    ('scale', {'factor': '10'})
    """
    name, colon, rest = part.partition(":")
    values: dict[str, str] = {}
    for option in rest.split(",") if colon else []:
        key, equals, value = (text.strip() for text in option.partition("="))
        if not equals or not key:
            raise ConfigError(f"{option.strip()!r} in {kind} spec {spec!r} isn't an option; write key=value")
        if key in values:
            raise ConfigError(f"{key!r} is given twice in {part!r}")
        values[key] = value
    return name.strip(), values


def from_mapping(cls: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    """Build the dataclass ``cls`` from the entries of ``values`` whose key starts with ``prefix``.

    Keys are kebab-case. The empty string stands for None where a field allows it, and a comma-separated string for a
    tuple, because Flower configs hold scalars only. Unknown keys under the prefix, values of the wrong type and
    settings that are missing without having a default raise ``ConfigError`` naming the key.

    >>> from_mapping(LoraOptions, {"lora.rank": 4, "lora.targets": "q_proj,v_proj", "other": 1}, "lora.")
    LoraOptions(rank=4, alpha=16.0, dropout=0.0, targets=('q_proj', 'v_proj'))
    """
    hints = typing.get_type_hints(cls)
    fields = {kebab(f.name): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        if name not in fields:
            raise ConfigError(f"unknown setting {key!r}; {near(name, fields)}")
        kwargs[fields[name].name] = _convert(value, hints[fields[name].name], key)
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        check(not (needed and field.init) or field.name in kwargs, f"setting {prefix + name!r} is missing")
    return cls(**kwargs)


def to_mapping(config: Any, prefix: str = "") -> dict[str, Scalar]:
    """The inverse of :func:`from_mapping`: a flat table of scalars that a Flower ConfigRecord can hold."""
    flat: dict[str, Scalar] = {}
    for field in dataclasses.fields(config):
        key, value = prefix + kebab(field.name), getattr(config, field.name)
        if value is None:
            flat[key] = ""
        elif isinstance(value, tuple):
            flat[key] = ",".join(str(v) for v in value)
        else:
            flat[key] = value
    return flat


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "":
            return None
        return _convert(value, next(a for a in args if a is not type(None)), key)
    if origin is Literal:
        return _choice(value, args, key)
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        parts = list(parts) if isinstance(parts, list | tuple) else [parts]
        return tuple(_convert(p.strip() if isinstance(p, str) else p, args[0], key) for p in parts if p != "")
    return _convert_scalar(value, hint, key)


def _choice(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    if value not in choices:
        raise ConfigError(f"{key} = {value!r} isn't possible; {near(str(value), [str(c) for c in choices])}")
    return value


def _convert_scalar(value: Any, kind: type, key: str) -> Any:
    wrong = ConfigError(f"{key} = {value!r} must be of type {kind.__name__}")
    if kind is bool:
        table = {"true": True, "false": False, "1": True, "0": False}
        text = str(value).lower()
        if not isinstance(value, bool | int | str) or text not in table:
            raise wrong
        return table[text]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong
    try:
        if kind is int:
            return _whole(value)
        return kind(value)
    except (ValueError, OverflowError) as error:
        raise wrong from error


def _whole(value: str | int | float) -> int:
    """An int from 8, 8.0, "8" or "1e3". Digits don't go through float, which would round a long seed."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError(value)
    return int(value)
