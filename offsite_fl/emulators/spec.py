"""The one grammar for emulators in the command line, TOML and Python: ``name:key=value,key=value+name...``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from offsite_fl.config import from_mapping, kebab, read_spec
from offsite_fl.emulators.base import METHODS, Chain, EmulatorMethod
from offsite_fl.errors import ConfigError


@dataclass(frozen=True)
class OptionHelp:
    """One option of a method: its key in a spec, what it accepts, and its default as spec text (None: required).

    What ``none`` stands for follows in the type if it can be told in a few words: the entry ``none`` in the metadata of
    the option's field.
    """

    key: str
    type: str
    default: str | None


@dataclass(frozen=True)
class MethodHelp:
    """What a command line needs to print about a method."""

    name: str
    summary: str
    options: tuple[OptionHelp, ...]


@functools.cache
def discover() -> None:
    """Import every module of this package once, so that each method has registered itself."""
    package = importlib.import_module("offsite_fl.emulators")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def parse_emulator(spec: str | EmulatorMethod) -> EmulatorMethod:
    """Build the method (a :class:`Chain` if there are several) that ``spec`` names; a method passes through.

    Within a value, ``/`` separates the items of a list and the empty string means none. ``ConfigError`` names the part
    of the spec that is wrong and the names or keys near to it.

    >>> str(parse_emulator("layer-drop:keep=8+low-rank:keep=0.4"))
    'layer-drop:keep=8+low-rank:keep=0.4'
    """
    if isinstance(spec, EmulatorMethod):
        return spec
    discover()
    methods = [_parse_one(part.strip(), spec) for part in spec.split("+")]
    return methods[0] if len(methods) == 1 else Chain(tuple(methods))


def describe_emulators() -> tuple[MethodHelp, ...]:
    """Every known method by name, with the first line of its docstring and its options."""
    discover()
    return tuple(_describe(name, METHODS[name]) for name in METHODS)


def _parse_one(part: str, spec: str) -> EmulatorMethod:
    name, given = read_spec(part, "emulator", spec)
    if not name:
        raise ConfigError(f"emulator spec {spec!r} has an empty part; write name:key=value, chained with '+'")
    cls = METHODS[name]
    options = {option.key: option for option in _options(cls)}
    lists = {key for key, option in options.items() if option.type.startswith("list of")}
    values = {f"{name}:{key}": text.replace("/", ",") if key in lists else text for key, text in given.items()}
    missing = [key for key, option in options.items() if option.default is None and key not in given]
    # Where a key is unknown too, that it is misspelt is the likelier cause, which from_mapping names.
    if missing and given.keys() <= options.keys():
        raise ConfigError(f"emulator {name!r} needs {', '.join(missing)}; for example {name}:{missing[0]}=...")
    return from_mapping(cls, values, f"{name}:")


def _describe(name: str, cls: type[EmulatorMethod]) -> MethodHelp:
    doc = (cls.__doc__ or "").strip()
    return MethodHelp(name, doc.splitlines()[0] if doc else "", _options(cls))


def _options(cls: type[EmulatorMethod]) -> tuple[OptionHelp, ...]:
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = None if default is dataclasses.MISSING else _default_text(default)
        kind = _type_text(hints[field.name])
        if "none" in field.metadata:
            kind += f": {field.metadata['none']}"
        found.append(OptionHelp(kebab(field.name), kind, text))
    return tuple(found)


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return "" if value is None else str(value)


def _type_text(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _type_text(a) for a in args)
    if origin is tuple:
        return f"list of {_type_text(args[0])}"
    return str(getattr(hint, "__name__", hint))
