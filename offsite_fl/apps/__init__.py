"""What Flower Apps around :class:`~offsite_fl.strategies.OffsiteTuning` have in common on the model owner's side."""

from offsite_fl.apps.federation import make_strategy_for, open_bundle, seed_everything
from offsite_fl.apps.rows import five_rows
from offsite_fl.apps.settings import BaselinePart, FederationKeys, RunPart, parts_of
from offsite_fl.apps.timing import Clock
from offsite_fl.apps.tracking import track, tracking_for
from offsite_fl.apps.work import Work, sums_by_client

__all__ = [
    "BaselinePart",
    "Clock",
    "FederationKeys",
    "RunPart",
    "Work",
    "five_rows",
    "make_strategy_for",
    "open_bundle",
    "parts_of",
    "seed_everything",
    "sums_by_client",
    "track",
    "tracking_for",
]
