"""Strict reading of the JSON that reports are made of: every surprise is a ``DataError`` that says where it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from offsite_fl.errors import DataError
from offsite_fl.registry import near


def entries(
    value: object, where: str, required: Collection[str] = (), optional: Collection[str] = ()
) -> dict[str, Any]:
    """``value`` as a dict that has all ``required`` keys and, beyond them, ``optional`` ones only.

    With neither given, any keys are taken as long as they are strings.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise DataError(f"{where} has the key {key!r}; keys must be strings")
    missing = [key for key in required if key not in value]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}")
    known = [*required, *optional]
    for key in value:
        if known and key not in known:
            raise DataError(f"{where} has the unknown key {key!r}; {near(key, known)}")
    return dict(value)


def items(value: object, where: str) -> list[Any]:
    """``value`` as a list."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} must be a list, got {type(value).__name__}")
    return list(value)


def number(value: object, where: str) -> float:
    """``value`` if it is a number; JSON has no NaN, so null stands for one that isn't finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where} must be a number, got {value!r}")
    return value


def whole(value: object, where: str, least: int = 0) -> int:
    """``value`` as an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{where} must be a whole number of at least {least}, got {value!r}")
    return value


def text(value: object, where: str) -> str:
    """``value`` as a string."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, got {value!r}")
    return value


def jsonable(value: Any, where: str = "value") -> Any:
    """``value`` in JSON's own types: mappings, lists, text, numbers; a number that isn't finite becomes null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if hasattr(value, "item"):  # a number of numpy or torch
        return jsonable(value.item(), where)
    raise DataError(f"{where} can't be written as JSON: {type(value).__name__}")
