"""Where a run's numbers go as they come: the run config's ``run.tracker`` and ``run.tracking``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite_fl.apps.settings import RunPart
from offsite_fl.evaluation.tracking import Tracking, check_tracker
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.checkpoint import check_unused


def tracking_for(run: RunPart, run_config: Mapping[str, Any]) -> Tracking:
    """The run's tracker, which may be none; to be called first, so that what can't be had ends the run before it began.

    ``ConfigError`` names the extra that is missing. Nothing is written where the run itself would be refused.
    """
    folder = Path(run.folder).absolute()
    check_tracker(run.tracker, run.tracking)
    if run.tracker and not run.resume:
        check_unused(folder)
    return Tracking(run.tracker, run.tracking, folder.name, run_config, folder / "tracking")


def track(strategy: OffsiteTuning, tracking: Tracking) -> None:
    """Let ``tracking`` have each round of ``strategy`` as soon as it is over."""
    if tracking.kind:
        strategy.on_round = lambda record: tracking.round(record, strategy.ledger)
