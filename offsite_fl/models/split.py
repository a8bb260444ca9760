"""Which blocks are the adapter: ``Split(first=2, last=2)`` or ``Split(at=(0, 5, 18, 23))``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from offsite_fl.errors import SplitError


@dataclass(frozen=True)
class Split:
    """The adapter's blocks, either the ``first`` and ``last`` so many or exactly those ``at`` the given indices.

    With ``at``, ``first`` and ``last`` don't count and read 0. Impossible settings raise ``SplitError`` at once, those
    that don't fit a model when the depth is known.

    Examples
    --------
    >>> Split(first=2, last=2).resolve(6)
    (0, 1, 4, 5)
    >>> Split(at=(5, 0)).middle(6)
    (1, 2, 3, 4)
    """

    first: int = 2
    last: int = 2
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model; sort ``at``."""
        if self.at is not None:
            indices = tuple(self.at)
            if not indices or not all(_is_count(index) for index in indices):
                raise SplitError(f"at={indices!r} should be one or more block indices, counted from 0")
            if len(set(indices)) < len(indices):
                raise SplitError(f"at={indices!r} names a block twice; each index may stand once")
            object.__setattr__(self, "at", tuple(sorted(indices)))
            object.__setattr__(self, "first", 0)
            object.__setattr__(self, "last", 0)
            return
        for name, count in (("first", self.first), ("last", self.last)):
            if not _is_count(count):
                raise SplitError(f"{name}={count!r} should be a whole number of blocks, 0 or more")
        if self.first + self.last == 0:
            raise SplitError("first=0, last=0 leaves no adapter to tune; at least one block must be adapter")

    def resolve(self, depth: int) -> tuple[int, ...]:
        """Return the sorted indices of the adapter's blocks in a model of ``depth`` blocks, or raise ``SplitError``."""
        if depth < 2:
            raise SplitError(
                f"a model of {depth} block(s) can't be split: it takes one for the adapter and one to emulate"
            )
        if self.at is not None:
            if self.at[-1] >= depth:
                outside = ", ".join(str(index) for index in self.at if index >= depth)
                raise SplitError(
                    f"block(s) {outside} of {self} don't exist: the model has {depth} blocks, 0 to {depth - 1}"
                )
            if len(self.at) == depth:
                raise SplitError(
                    f"{self} takes all {depth} blocks; name at most {depth - 1} so that one can be emulated"
                )
            return self.at
        if self.first + self.last >= depth:
            raise SplitError(
                f"{self} takes {self.first + self.last} blocks as adapter, but the model has {depth} and at least one "
                f"must be left to emulate: first + last may be at most {depth - 1}"
            )
        return (*range(self.first), *range(depth - self.last, depth))

    def middle(self, depth: int) -> tuple[int, ...]:
        """Return the sorted indices of the blocks that aren't adapter: what the emulator stands for."""
        adapter = set(self.resolve(depth))
        return tuple(index for index in range(depth) if index not in adapter)

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read what ``str()`` writes: ``"2-2"`` (first-last) or ``"at=0,5,18,23"``.

        >>> Split.parse("0-2"), str(Split.parse("at=5,0"))
        (Split(first=0, last=2, at=None), 'at=0,5')
        """
        compact = text.replace(" ", "")
        if match := re.fullmatch(r"(\d+)-(\d+)", compact):
            return cls(first=int(match[1]), last=int(match[2]))
        if match := re.fullmatch(r"at=(\d+(?:,\d+)*)", compact):
            return cls(at=tuple(int(index) for index in match[1].split(",")))
        raise SplitError(f"split {text!r} can't be read; write first-last as '2-2', or block indices as 'at=0,5,18,23'")

    def __str__(self) -> str:
        """Write the split the way :meth:`parse` reads it."""
        if self.at is not None:
            return "at=" + ",".join(str(index) for index in self.at)
        return f"{self.first}-{self.last}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
