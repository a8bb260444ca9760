"""What was measured of one cell, and the line of JSON that holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from offsite_fl.choosing.results import read_plain
from offsite_fl.comparing.cells import Arm, Cell, Condition
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import RoundRecord

SECONDS, PEAK = "seconds", "peak_bytes"


@dataclass(frozen=True)
class Point:
    """A cell after a round: losses in nats per token, and what all rounds so far have cost.

    ``bytes`` went both ways, the bundle included once a client; ``client_seconds`` were spent tuning by all clients
    together.
    """

    round: int
    plug_in: float
    emulator: float | None
    bytes: int
    client_seconds: float


@dataclass(frozen=True)
class Measured:
    """A cell's key and everything that was measured of it; ``error`` says why there is nothing.

    ``rounds`` and ``ledger`` are the federation's own records (a reference that isn't one has two rounds: before and
    after); the ledger is without the bundle, whose ``bundle_bytes`` each client gets once. ``by_domain`` has the final
    plug-in's loss on each domain of the test text, ``by_client`` that on each client's own mixture of domains.
    ``peak_bytes`` is the most memory that tuning took in any client beyond what its process held before. ``seconds``
    is wall time of the cell.
    """

    key: str
    cell: Cell
    rounds: tuple[RoundRecord, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    by_domain: dict[str, float] = field(default_factory=dict)
    by_client: dict[str, float] = field(default_factory=dict)
    bundle_bytes: int = 0
    peak_bytes: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    def points(self) -> list[Point]:
        """The rounds after which the plug-in was measured."""
        found, spent = [], 0.0
        sent, bundles = self.ledger.totals("round"), self.bundle_bytes * self.reached
        for entry in self.rounds:
            spent += sum(metrics.get(SECONDS, 0.0) for metrics in entry.clients.values())
            if entry.plug_in is not None and entry.plug_in.loss is not None:
                so_far = sum(amount for (number,), amount in sent.items() if number <= entry.round)
                so_far += bundles if entry.round > 0 else 0
                emulator = entry.emulator.loss if entry.emulator is not None else None
                found.append(Point(entry.round, entry.plug_in.loss, emulator, so_far, spent))
        return found

    @property
    def zero_shot(self) -> float | None:
        """Loss of the untuned full model, where the cell has measured it."""
        return next((point.plug_in for point in self.points() if point.round == 0), None)

    @property
    def reached(self) -> int:
        """How many clients took part in any round."""
        return len({name for entry in self.rounds for name in entry.clients})

    @property
    def last(self) -> Point | None:
        """The result."""
        return max(self.points(), key=lambda point: point.round, default=None)

    @property
    def gap(self) -> float | None:
        """How far the tuned emulator stays behind the plug-in, in nats per token."""
        last = self.last
        return None if last is None or last.emulator is None else last.emulator - last.plug_in

    @property
    def worst_client(self) -> float | None:
        """The largest of ``by_client``."""
        return max(self.by_client.values(), default=None)

    @property
    def spread(self) -> float | None:
        """Population standard deviation over ``by_client``, as in arXiv 1905.10497, section 5."""
        values = list(self.by_client.values())
        if not values or not all(map(math.isfinite, values)):
            return None
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))

    @property
    def down(self) -> int:
        """Bytes to all clients, the bundle once each."""
        return self.ledger.total(direction="down") + self.bundle_bytes * self.reached

    @property
    def up(self) -> int:
        """Bytes from all clients."""
        return self.ledger.total(direction="up")

    @property
    def client_seconds(self) -> float:
        """What all clients together spent tuning."""
        return sum(metrics.get(SECONDS, 0.0) for entry in self.rounds for metrics in entry.clients.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON's own types; a number that isn't finite becomes null."""
        found: dict[str, Any] = {
            "key": self.key,
            **cell_to_dict(self.cell),
            "rounds": [entry.to_dict() for entry in self.rounds],
            "ledger": self.ledger.to_list(),
            "by_domain": self.by_domain,
            "by_client": self.by_client,
            "bundle_bytes": self.bundle_bytes,
            "peak_bytes": self.peak_bytes,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "error": self.error,
        }
        whole: dict[str, Any] = checks.jsonable(found, "cell")
        return whole

    @classmethod
    def from_dict(cls, value: object, where: str = "cell") -> Measured:
        """Read what :meth:`to_dict` wrote; ``DataError`` names the entry that is wrong."""
        names = (*vars(Arm("strategy")), *vars(Condition()), *(n for n in cls.__dataclass_fields__ if n != "cell"))
        found = checks.entries(value, where, required=(*names, "seed"))
        rounds = checks.items(found["rounds"], f"{where}.rounds")
        tables = {
            name: {k: checks.number(v, f"{where}.{name}.{k}") for k, v in checks.entries(found[name], name).items()}
            for name in ("by_domain", "by_client")
        }
        peak, error = found["peak_bytes"], found["error"]
        return cls(
            key=checks.text(found["key"], f"{where}.key"),
            cell=read_cell(found, where),
            rounds=tuple(RoundRecord.from_dict(entry, f"{where}.rounds[{i}]") for i, entry in enumerate(rounds)),
            ledger=Ledger.from_list(found["ledger"], f"{where}.ledger"),
            by_domain=tables["by_domain"],
            by_client=tables["by_client"],
            bundle_bytes=checks.whole(found["bundle_bytes"], f"{where}.bundle_bytes"),
            peak_bytes=None if peak is None else checks.whole(peak, f"{where}.peak_bytes"),
            tokens=checks.whole(found["tokens"], f"{where}.tokens"),
            seconds=checks.number(found["seconds"], f"{where}.seconds"),
            error=None if error is None else checks.text(error, f"{where}.error"),
        )


def cell_to_dict(cell: Cell) -> dict[str, Any]:
    """A cell in JSON's own types."""
    return {**vars(cell.arm), **vars(cell.condition), "seed": cell.seed}


def read_cell(found: dict[str, Any], where: str) -> Cell:
    """A cell from the entries that :func:`cell_to_dict` wrote, others beside them."""
    arm = read_plain(Arm, {f.name: found[f.name] for f in fields(Arm)}, where)
    condition = read_plain(Condition, {f.name: found[f.name] for f in fields(Condition)}, where)
    return Cell(arm, condition, checks.whole(found["seed"], f"{where}.seed"))
