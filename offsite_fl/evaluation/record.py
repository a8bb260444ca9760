"""The record of a run: one object that becomes report.json, report.csv and report.html, and is read back."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.evaluation.rows import FiveRows
from offsite_fl.evaluation.samples import Sample
from offsite_fl.version import __version__

T = TypeVar("T")

FORMAT = 1
REQUIRED = ("rows", "gap", "recovered", "ledger", "rounds", "config", "versions", "seeds", "seconds")
OPTIONAL = ("format", "emulator", "data", "notes", "samples")
LIBRARIES = ("torch", "transformers", "flwr", "peft", "accelerate", "datasets", "safetensors")


@dataclass
class RunReport:
    """All that a run has to tell.

    Parameters
    ----------
    rows
        The five rows. ``gap`` and ``recovered`` are derived from them.
    ledger, rounds
        Bytes on the wire, and what happened round by round. Both empty where one party tuned without a federation.
    config
        Settings as a flat table (:func:`offsite_fl.config.to_mapping`) or nested ones; shown as given, so no secrets.
    versions
        Library versions and the kind of machine, from :func:`versions`.
    seeds
        Every seed by what it seeds.
    seconds
        Wall time by stage, in order.
    emulator
        What the emulator is and costs: the fields of the emulator report (``bytes``, ``middle_bytes``, ``full_bytes``,
        ``verbatim_share``, ...), its ``spec``, and ``bundle_bytes``: bytes of the bundle by kind of content.
    data
        By part of the data (each client, held-out, calibration text): ``examples``, ``tokens`` and the like.
    notes
        Sentences that a reader of the numbers must know.
    samples
        Items of a public test set with what each network answers; never a data owner's.
    """

    rows: FiveRows
    ledger: Ledger = field(default_factory=Ledger)
    rounds: list[RoundRecord] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    emulator: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def gap(self) -> float | None:
        """The plug-in against the tuned emulator; see :attr:`FiveRows.gap`."""
        return self.rows.gap

    @property
    def recovered(self) -> float | None:
        """The share of full fine-tuning's gain that the plug-in keeps; see :attr:`FiveRows.recovered`."""
        return self.rows.recovered

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        plain = {k: checks.jsonable(getattr(self, k), k) for k in ("config", "versions", "seeds", "seconds")}
        more = {k: checks.jsonable(getattr(self, k), k) for k in ("emulator", "data", "notes")}
        return {
            "format": FORMAT,
            "rows": self.rows.to_dict(),
            "gap": self.gap,
            "recovered": self.recovered,
            "rounds": [entry.to_dict() for entry in self.rounds],
            "ledger": self.ledger.to_list(),
            **plain,
            **more,
            "samples": [sample.to_dict() for sample in self.samples],
        }

    @classmethod
    def from_dict(cls, value: object) -> RunReport:
        """Read what :meth:`to_dict` wrote; ``DataError`` names the entry that is wrong."""
        found = checks.entries(value, "report", REQUIRED, OPTIONAL)
        version = found.get("format", FORMAT)
        if version != FORMAT:
            raise DataError(f"the report has format {version!r}, this version of offsite_fl reads {FORMAT}")
        return cls(
            rows=FiveRows.from_dict(found["rows"]),
            ledger=Ledger.from_list(found["ledger"]),
            rounds=_list(found["rounds"], "rounds", RoundRecord.from_dict),
            config=checks.entries(found["config"], "config"),
            versions=_table(found["versions"], "versions", checks.text),
            seeds=_table(found["seeds"], "seeds", checks.whole),
            seconds=_table(found["seconds"], "seconds", checks.number),
            emulator=checks.entries(found.get("emulator", {}), "emulator"),
            data=_table(found.get("data", {}), "data", checks.entries),
            notes=_list(found.get("notes", []), "notes", checks.text),
            samples=_list(found.get("samples", []), "samples", Sample.from_dict),
        )

    def to_csv(self) -> str:
        """The rows as CSV with the columns ``row``, ``loss``, ``perplexity``, ``accuracy``; full precision.

        A classifier's have the column ``f1`` too.
        """
        out = io.StringIO()
        table = csv.DictWriter(
            out, ("row", "loss", "perplexity", "accuracy", *(["f1"] if self.rows.has_f1 else [])), lineterminator="\n"
        )
        table.writeheader()
        for key, row in self.rows:
            table.writerow({"row": key, **row.to_dict()})
        return out.getvalue()

    def write(self, folder: str | Path, *, page: bool = True) -> Path:
        """Write report.json, report.csv and, with ``page``, report.html into ``folder``; each file atomically.

        The page comes last: if matplotlib is missing (``ConfigError``), the numbers are safe by then.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            replace_file(folder / "report.json", text + "\n")
            replace_file(folder / "report.csv", self.to_csv())
            if page:
                # Here, not above: the page pulls in matplotlib, which is an extra.
                from offsite_fl.evaluation.page import render_page

                replace_file(folder / "report.html", render_page(self))
        except OSError as error:
            raise DataError(f"the report can't be written to {folder}: {error.strerror or error}") from error
        return folder

    @classmethod
    def read(cls, folder: str | Path) -> RunReport:
        """Read a report from the folder of a run, or from its report.json."""
        path = Path(folder)
        path = path / "report.json" if path.is_dir() else path
        try:
            value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json)
        except FileNotFoundError:
            raise DataError(f"there is no report at {path}; a run writes report.json into its folder") from None
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} isn't valid JSON: {error}") from error
        try:
            return cls.from_dict(value)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def _not_json(word: str) -> None:
    raise ValueError(f"{word} isn't JSON, null stands for it")


def _table(value: object, where: str, read: Callable[[object, str], T]) -> dict[str, T]:
    return {key: read(entry, f"{where}.{key}") for key, entry in checks.entries(value, where).items()}


def _list(value: object, where: str, read: Callable[[object, str], T]) -> list[T]:
    return [read(entry, f"{where}[{i}]") for i, entry in enumerate(checks.items(value, where))]


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and move it there, so that a reader sees the old file or the new one."""
    # Open for writing rather than mkstemp, whose files others on a shared machine couldn't read.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on and the kind of machine; no host name, no path.

    >>> versions()["offsite-fl"] == __version__
    True
    """
    import torch

    found = {"python": platform.python_version(), "offsite-fl": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["cpus"] = str(available_cores())
    found["cuda"] = f"yes ({torch.version.cuda})" if torch.cuda.is_available() else "no"
    return found
