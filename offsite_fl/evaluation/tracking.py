"""A run's numbers in TensorBoard or MLflow, round by round, through accelerate's trackers.

The libraries come with the extras ``tensorboard`` and ``mlflow``. One that is missing, or can't begin, is an error
before the run; one that fails later is left out of the rest of the run, which goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from offsite_fl.config import check
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.evaluation.rows import FiveRows
from offsite_fl.registry import near

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped,unused-ignore]

log = logging.getLogger("flwr.offsite")

Kind = Literal["tensorboard", "mlflow"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EXPERIMENT = "offsite-fl"
MLFLOW_URI = "MLFLOW_TRACKING_URI"
_NAME = re.compile(r"[^A-Za-z0-9_\-./]+")  # what both take in the names of metrics and settings


def check_tracker(kind: str, where: str = "") -> None:
    """``ConfigError`` if there is no such tracker or its library isn't installed; "" is none and always fine."""
    if not kind:
        check(not where, f"a place to track to is given ({where}), but no tracker: {near('', KINDS)}")
        return
    check(kind in KINDS, f"unknown tracker {kind!r}; {near(kind, KINDS)}")
    if importlib.util.find_spec(kind) is None:
        raise ConfigError(f"the tracker {kind} isn't installed; install it by: pip install 'offsite-fl[{kind}]'")
    remote = "://" in where and kind == "tensorboard"
    check(not remote, f"tensorboard writes into a folder, {where} is none; mlflow takes addresses")


class Tracking:
    """One run in a tracker, or in none (``kind`` ""), so that whoever has numbers need not ask.

    Args:
        kind: "tensorboard", "mlflow", or "" for none.
        where: a folder; for mlflow also the address of its server or database. Empty: ``default``, but where
            ``MLFLOW_TRACKING_URI`` is set, mlflow goes by that.
        name: of the run; TensorBoard's folder inside ``where``.
        settings: of the run, by name.
        default: folder if ``where`` is empty.

    ``ConfigError`` if the tracker isn't installed or can't begin.
    """

    def __init__(self, kind: str, where: str, name: str, settings: Mapping[str, Any], default: Path) -> None:
        check_tracker(kind, where)
        self.kind, self._tracker = kind, None
        if not kind:
            return
        try:
            self._tracker = _begun(cast(Kind, kind), where, _NAME.sub("-", name), default)
            self._tracker.store_init_configuration(plain_settings(settings))
        except Exception as error:  # whatever the library, a file system or a server says
            raise ConfigError(f"the tracker {kind} can't begin at {where or default}: {error}") from error

    def round(self, record: RoundRecord, ledger: Ledger) -> None:
        """What :func:`round_values` finds, at the round's number."""
        self.log(round_values(record, ledger), record.round)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, at a step."""
        named = {_NAME.sub("-", name): float(value) for name, value in values.items()}
        self._do(lambda tracker: tracker.log(named, step=step))

    def close(self) -> None:
        """The run is over."""
        self._do(lambda tracker: tracker.finish())
        self._tracker = None

    def _do(self, act: Callable[[GeneralTracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # the run is worth more than its curves
            log.warning("the tracker %s failed and is left out from here on: %s", self.kind, error)
            self._tracker = None


def _begun(kind: Kind, where: str, name: str, default: Path) -> GeneralTracker:
    from accelerate import tracking  # type: ignore[import-untyped,unused-ignore]

    folder = Path(where).absolute() if where else default.absolute()
    if kind == "tensorboard":
        tracker = tracking.TensorBoardTracker(name, folder)
    else:
        import mlflow  # type: ignore[import-not-found,unused-ignore]

        here = "://" not in where and (where or not os.environ.get(MLFLOW_URI))
        if where or here:
            mlflow.set_tracking_uri(_database(folder) if here else where)
        artifacts = str(folder / "artifacts") if here else None  # by default beside wherever the process works
        tracker = tracking.MLflowTracker(EXPERIMENT, artifacts, run_name=name)
    tracker.start()
    return tracker


def _database(folder: Path) -> str:
    """A file of our own: MLflow 3 refuses plain folders."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def plain_settings(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Settings as trackers take them: scalars as they are, lists with commas, None as the empty string."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        scalar = value if isinstance(value, str | int | float) else "" if value is None else str(value)
        found[_NAME.sub("-", name)] = scalar
    return found


def round_values(record: RoundRecord, ledger: Ledger) -> dict[str, float]:
    """What a round came to, by name.

    ``plug-in/loss`` and ``emulator/loss`` (nats per token, with ``perplexity``; or ``accuracy``) where they were
    measured; ``mean/NAME`` of what clients reported, each counted once, and ``clients/CLIENT/NAME``; ``replies/good``,
    ``/dropped`` and ``/clipped``; ``bytes/down`` and ``/up`` of this round; ``seconds``.
    """
    found: dict[str, float] = {}
    for network, row in (("plug-in", record.plug_in), ("emulator", record.emulator)):
        if row is not None:
            found[f"{network}/{row.measure}"] = row.value
            if row.loss is not None:
                found[f"{network}/perplexity"] = row.perplexity
    for name in sorted({name for metrics in record.clients.values() for name in metrics}):
        told = {client: metrics[name] for client, metrics in record.clients.items() if name in metrics}
        found |= {f"clients/{client}/{name}": value for client, value in told.items()}
        found[f"mean/{name}"] = math.fsum(told.values()) / len(told)
    if record.round > 0:
        found |= {"replies/good": len(record.clients), "replies/dropped": len(record.dropped)}
        found["replies/clipped"] = record.clipped
        sums = ledger.totals("round", "direction")
        found |= {f"bytes/{way}": sums.get((record.round, way), 0) for way in ("down", "up")}
    if record.seconds is not None:
        found["seconds"] = record.seconds
    return found


def final_values(rows: FiveRows) -> dict[str, float]:
    """The five rows under ``rows/``, and ``gap`` and ``recovered`` where there are any."""
    found = {f"rows/{key}/{row.measure}": row.value for key, row in rows}
    more = {"gap": rows.gap, "recovered": rows.recovered}
    return found | {f"rows/{name}": value for name, value in more.items() if value is not None}
