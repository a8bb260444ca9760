"""What happened in one round of a federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.rows import Row


@dataclass(frozen=True)
class Dropped:
    """A reply that was left out of the average, and why."""

    node: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """What report.json holds."""
        return {"node": self.node, "reason": self.reason}


@dataclass
class RoundRecord:
    """One round, as it goes into ``rounds`` of report.json. Round 0 is the state before any tuning.

    ``plug_in`` and ``emulator`` are the aggregated adapter in the full model and in the emulator, measured after the
    round; ``clients`` holds by client name what each reported (``train_loss``, ``num_examples``, ...); ``skipped``
    marks a round with too few good replies, which left the adapter as it was; ``clipped`` counts the replies whose
    update was scaled down to a bound; ``seconds`` is wall time.
    """

    round: int
    plug_in: Row | None = None
    emulator: Row | None = None
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    skipped: bool = False
    clipped: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        checks.whole(self.round, "round")

    def to_dict(self) -> dict[str, Any]:
        """What report.json and checkpoints hold."""
        return {
            "round": self.round,
            "plug_in": self.plug_in.to_dict() if self.plug_in else None,
            "emulator": self.emulator.to_dict() if self.emulator else None,
            "clients": checks.jsonable(self.clients, "clients"),
            "dropped": [reply.to_dict() for reply in self.dropped],
            "skipped": self.skipped,
            "clipped": self.clipped,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, value: object, where: str = "round") -> RoundRecord:
        """Read what :meth:`to_dict` wrote."""
        names = ("plug_in", "emulator", "clients", "dropped", "skipped", "clipped", "seconds")
        found = checks.entries(value, where, required=("round",), optional=names)
        rows = {k: Row.from_dict(found[k], f"{where}.{k}") for k in names[:2] if found.get(k) is not None}
        skipped, seconds = found.get("skipped", False), found.get("seconds")
        if not isinstance(skipped, bool):
            raise DataError(f"{where}.skipped must be true or false, got {skipped!r}")
        return cls(
            round=checks.whole(found["round"], f"{where}.round"),
            plug_in=rows.get("plug_in"),
            emulator=rows.get("emulator"),
            clients=_clients(found.get("clients", {}), f"{where}.clients"),
            dropped=_dropped(found.get("dropped", []), f"{where}.dropped"),
            skipped=skipped,
            clipped=checks.whole(found.get("clipped", 0), f"{where}.clipped"),
            seconds=None if seconds is None else checks.number(seconds, f"{where}.seconds"),
        )


def _clients(value: object, where: str) -> dict[str, dict[str, float]]:
    def metrics(name: str, found: Mapping[str, Any]) -> dict[str, float]:
        return {key: checks.number(number, f"{where}.{name}.{key}") for key, number in found.items()}

    return {n: metrics(n, checks.entries(m, f"{where}.{n}")) for n, m in checks.entries(value, where).items()}


def _dropped(value: object, where: str) -> list[Dropped]:
    replies = []
    for i, item in enumerate(checks.items(value, where)):
        found = checks.entries(item, f"{where}[{i}]", required=("node", "reason"))
        replies.append(Dropped(*(checks.text(found[key], f"{where}[{i}].{key}") for key in ("node", "reason"))))
    return replies
