"""How far dropping places one by one has come, kept in a small JSON file so that it goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offsite_fl.config import check
from offsite_fl.errors import CheckpointError, ConfigError
from offsite_fl.evaluation.record import replace_file

FORMAT = 1


@dataclass
class Elimination:
    """Places that were ``dropped``, in this order, and what trying others has shown.

    ``costs`` say what each place cost when it was last tried, ``value`` what those left are worth; None before the
    first is dropped.
    """

    dropped: list[int] = field(default_factory=list)
    costs: dict[int, float] = field(default_factory=dict)
    value: float | None = None

    def left(self, places: Sequence[int]) -> list[int]:
        """Those of ``places`` that weren't dropped, in order."""
        return [place for place in places if place not in self.dropped]


class SavedElimination:
    """The file of one elimination, below ``workdir`` in a folder named after the run's fingerprint ``key``.

    Another run (other options, blocks, weights, text or seed) has another fingerprint and never meets this file.
    ``name`` is the method's.
    """

    def __init__(self, workdir: Path, key: str, name: str) -> None:
        self.key = key
        self.path = Path(workdir) / f"{name}-{key[:16]}" / "state.json"

    def save(self, state: Elimination) -> None:
        """Replace the file by the state of now, atomically: a crash leaves the old one."""
        # Python writes a float so that the same one is read back.
        text = json.dumps(
            {
                "format": FORMAT,
                "fingerprint": self.key,
                "dropped": state.dropped,
                "costs": [[place, cost] for place, cost in state.costs.items()],
                "value": state.value,
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, text)

    def load(self, places: Sequence[int], count: int) -> Elimination:
        """The state that was kept, of dropping ``places`` until ``count`` are left, or a fresh one.

        ``CheckpointError`` if the file is damaged.
        """
        if not self.path.exists():
            return Elimination()
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
            check(told["format"] == FORMAT and told["fingerprint"] == self.key, "it is of another run")
            dropped = [int(place) for place in told["dropped"]]
            costs = {int(place): float(cost) for place, cost in told["costs"]}
            check(set(dropped) | set(costs) <= set(places), "it names other places")
            check(1 <= len(set(dropped)) == len(dropped) <= len(places) - count, "it has dropped too many or too few")
            return Elimination(dropped, costs, float(told["value"]))
        except (OSError, KeyError, ValueError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{self.path} can't be read as the checkpoint of this run ({error}); delete it to start anew"
            ) from error
