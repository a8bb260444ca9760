"""What a comparison leaves behind: compare.html, compare.csv, compare.tex and compare.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite_fl.comparing.division import HOLDINGS, read_holdings
from offsite_fl.comparing.page import render_comparison, sentence
from offsite_fl.comparing.places import Places
from offsite_fl.comparing.settings import PARTS
from offsite_fl.comparing.summary import Summary
from offsite_fl.comparing.table import to_csv, to_latex
from offsite_fl.config import to_mapping
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.record import replace_file


def write_report(summary: Summary, places: Places, versions: Mapping[str, str]) -> list[Path]:
    """Write the four files into the comparison's folder, each atomically; the page comes last."""
    out = places.out
    text = json.dumps(to_dict(summary, versions), indent=1, ensure_ascii=False, allow_nan=False)
    files = {"compare.json": text + "\n", "compare.csv": to_csv(summary), "compare.tex": to_latex(summary)}
    for name, content in files.items():
        replace_file(out / name, content)
    replace_file(out / "compare.html", render_comparison(summary, held_in(summary, places), versions))
    return [out / name for name in ("compare.html", *files)]


def held_in(summary: Summary, places: Places) -> dict[tuple[str, int], dict[str, dict[str, int]]]:
    """Characters by client and domain of every partition and number of clients, with the first seed."""
    axes = summary.settings.grid
    found = {}
    for partition in axes.partitions:
        for clients in axes.clients:
            folder = places.data_folder(partition, clients, axes.seeds[0])
            if (folder / HOLDINGS).is_file():
                found[partition, clients] = read_holdings(folder)
    return found


def to_dict(summary: Summary, versions: Mapping[str, str]) -> dict[str, Any]:
    """Everything the page shows as JSON's own types; a number that isn't finite becomes null."""
    settings, lead = summary.settings, summary.lead
    standings = [
        {
            **vars(condition),
            **vars(standing.arm),
            **{f.name: _plain(getattr(standing, f.name)) for f in dataclasses.fields(standing)[3:]},
            "seeds": [found.cell.seed for found in standing.measured],
        }
        for condition, several in summary.by_condition.items()
        for standing in several
    ]
    table = {
        "settings": {part: to_mapping(getattr(settings, part)) for part in PARTS if part != "tune-for"},
        "tune_for": settings.tune_for,
        "versions": versions,
        "standings": standings,
        "overall": [{**vars(arm), "plug_in": _plain(mean)} for arm, mean in summary.overall],
        "lead": sentence(lead),
        "p": lead.paired.p if lead and lead.paired else None,
        "differences": list(lead.paired.differences) if lead and lead.paired else [],
        "failed": [{"cell": found.cell.label, "error": found.error} for found in summary.failed],
        "missing": summary.missing,
    }
    done: dict[str, Any] = checks.jsonable(table, "comparison")
    return done


def _plain(value: object) -> object:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
