"""Every byte that crossed the wall between the two parties, by round, kind, direction and node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks
from offsite_fl.registry import near

Kind = Literal["bundle", "patch", "adapter", "update", "metrics"]
Direction = Literal["down", "up"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
FIELDS = ("round", "kind", "direction", "node", "bytes")


@dataclass(frozen=True)
class LedgerEntry:
    """``bytes`` of one ``kind`` that went ``down`` to a node or came ``up`` from it in a round (0: before the first).

    ``node`` is text because Flower's 64-bit node ids don't survive a JSON reader that holds numbers as floats.
    """

    round: int
    kind: Kind
    direction: Direction
    node: str
    bytes: int

    def __post_init__(self) -> None:
        checks.whole(self.round, "ledger round")
        checks.whole(self.bytes, "ledger bytes")
        checks.text(self.node, "ledger node")
        for name, value, known in (("kind", self.kind, KINDS), ("direction", self.direction, DIRECTIONS)):
            if value not in known:
                raise DataError(f"unknown ledger {name} {value!r}; {near(str(value), known)}")


class Ledger:
    """A sum of bytes per (round, kind, direction, node), in the order in which they first came.

    >>> ledger = Ledger()
    >>> ledger.add(1, "bundle", "down", "a", 100)
    >>> ledger.add(1, "bundle", "down", "a", 20)
    >>> ledger.add(1, "update", "up", "b", 7)
    >>> ledger.totals("kind"), ledger.total(direction="down"), len(ledger)
    ({('bundle',): 120, ('update',): 7}, 120, 2)
    """

    def __init__(self, entries: Iterable[LedgerEntry] = ()) -> None:
        self._bytes: dict[tuple[int, Kind, Direction, str], int] = {}
        for entry in entries:
            self._put(entry)

    def _put(self, entry: LedgerEntry) -> None:
        key = (entry.round, entry.kind, entry.direction, entry.node)
        self._bytes[key] = self._bytes.get(key, 0) + entry.bytes

    def add(self, round: int, kind: Kind, direction: Direction, node: str | int, bytes: int) -> None:
        """Count ``bytes``; what has the same round, kind, direction and node (the shards of a bundle) is summed."""
        self._put(LedgerEntry(round, kind, direction, str(node), bytes))

    def rename(self, node: str, name: str) -> None:
        """Book under ``name`` what was booked under ``node``."""
        if name != node and any(key[3] == node for key in self._bytes):
            entries = list(self)
            self._bytes.clear()
            for entry in entries:
                self._put(replace(entry, node=name) if entry.node == node else entry)

    def totals(self, *by: str) -> dict[tuple[Any, ...], int]:
        """Bytes by any of ``round``, ``kind``, ``direction``, ``node``: keys are tuples in the order asked for."""
        for name in by:
            if name not in FIELDS[:4]:
                raise DataError(f"a ledger can't be summed by {name!r}; {near(name, FIELDS[:4])}")
        sums: dict[tuple[Any, ...], int] = {}
        for entry in self:
            key = tuple(getattr(entry, name) for name in by)
            sums[key] = sums.get(key, 0) + entry.bytes
        return sums

    def total(self, **where: int | str) -> int:
        """Bytes of all entries that match, for instance ``total(round=2, kind="bundle")``."""
        names = tuple(where)
        return self.totals(*names).get(tuple(where.values()), 0)

    def to_list(self) -> list[dict[str, int | str]]:
        """What report.json and checkpoints hold: one flat object an entry."""
        return [{name: getattr(entry, name) for name in FIELDS} for entry in self]

    @classmethod
    def from_list(cls, value: object, where: str = "ledger") -> Ledger:
        """Read what :meth:`to_list` wrote; ``DataError`` names the entry that is wrong."""
        ledger = cls()
        for i, item in enumerate(checks.items(value, where)):
            found = checks.entries(item, f"{where}[{i}]", required=FIELDS)
            try:
                ledger._put(LedgerEntry(**found))
            except DataError as error:
                raise DataError(f"{where}[{i}]: {error}") from error
        return ledger

    def __iter__(self) -> Iterator[LedgerEntry]:
        return (LedgerEntry(*key, amount) for key, amount in self._bytes.items())

    def __len__(self) -> int:
        return len(self._bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._bytes == other._bytes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ledger({len(self)} entries, {self.total():,} bytes)"
