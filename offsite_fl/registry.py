"""A table of named things (emulators, strategies, codecs) filled by a decorator."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from offsite_fl.errors import ConfigError

T = TypeVar("T")


def near(name: str, choices: Iterable[str]) -> str:
    """Finish an error message about an unknown ``name``: the nearest choices first, then all of them.

    >>> near("layerdrop", ["layer-drop", "quantize"])
    "did you mean 'layer-drop'? Known: layer-drop, quantize"
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(c) for c in close) + "? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}"


class Registry(Generic[T]):
    """Names to things of one kind.

    >>> shapes: Registry[type] = Registry("shape")
    >>> @shapes.register("circle")
    ... class Circle: ...
    >>> shapes["circle"].__name__
    'Circle'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an object under ``name``; a name that is taken raises ``ConfigError``."""

        def add(item: T) -> T:
            if name in self._items:
                raise ConfigError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ConfigError(f"unknown {self.kind} {name!r}; {near(name, self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
