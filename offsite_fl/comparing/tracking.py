"""The cells of a comparison in TensorBoard or MLflow: a run for each, as soon as it is measured."""

from __future__ import annotations

import logging
import re

from offsite_fl.comparing.places import Places
from offsite_fl.comparing.results import Measured
from offsite_fl.config import to_mapping
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.tracking import Tracking, check_tracker

log = logging.getLogger("flwr.offsite")


class CellTracker:
    """Gives each measured cell a run of its own in a tracker: settings, numbers by round, and what it came to.

    ``kind`` and ``where`` as :class:`~offsite_fl.evaluation.tracking.Tracking` takes them; an empty ``where`` is the
    folder ``tracking`` of the comparison. ``ConfigError`` if there is no such tracker.
    """

    def __init__(self, places: Places, kind: str, where: str = "") -> None:
        check_tracker(kind, where)
        self.places, self.kind, self.where = places, kind, where

    def __call__(self, found: Measured) -> None:
        """Write one cell. A tracker that fails is left out from then on; the comparison goes on."""
        if not self.kind:
            return
        settings = settings_of(self.places, found)
        try:
            run = Tracking(self.kind, self.where, run_name(found), settings, self.places.out / "tracking")
        except ConfigError as error:
            log.warning("%s; cells aren't tracked from here on", error)
            self.kind = ""
            return
        for record in found.rounds:
            run.round(record, found.ledger)
        last = found.last
        run.log(final_values(found), last.round if last is not None else 0)
        run.close()


def run_name(found: Measured) -> str:
    """The cell in a word or two, and the beginning of its key, so that no two cells are one run."""
    cell = re.sub(r"[^A-Za-z0-9.]+", "-", found.cell.label).strip("-")
    return f"{cell[:120]}-{found.key[:8]}"


def settings_of(places: Places, found: Measured) -> dict[str, object]:
    """What the cell is, by name: its arm, condition and seed, how its clients tune, and why there is no result."""
    cell, grid = found.cell, places.settings.grid
    parts = {**vars(cell.arm), **vars(cell.condition), "seed": cell.seed, "key": found.key}
    parts |= {"model": places.settings.model.path, "split": str(places.split(cell)), "codec": grid.codec}
    parts |= {"rounds": grid.rounds, "error": found.error or ""}
    return parts | to_mapping(places.tune(cell), "tune.")


def final_values(found: Measured) -> dict[str, float]:
    """What the cell came to, under ``final/``; losses in nats per token, ``bytes`` and ``peak_bytes`` in bytes."""
    last = found.last
    values: dict[str, float | None] = {
        "plug_in": None if last is None else last.plug_in,
        "emulator": None if last is None else last.emulator,
        "zero_shot": found.zero_shot,
        "gap": found.gap,
        "worst_client": found.worst_client,
        "spread": found.spread,
        "bytes": None if last is None else last.bytes,
        "client_seconds": None if last is None else last.client_seconds,
        "peak_bytes": found.peak_bytes,
        "seconds": found.seconds,
    }
    values |= {f"by_domain/{name}": loss for name, loss in found.by_domain.items()}
    return {f"final/{name}": float(value) for name, value in values.items() if value is not None}
