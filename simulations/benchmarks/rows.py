"""``python -m simulations.benchmarks.rows FOLDER...``: the five rows of several runs, each mean with its deviation."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS, ROW_LABELS, Row

Number = Callable[[Row], float | None]


def summary(reports: Sequence[RunReport]) -> str:
    """A Markdown table: for each row its number in every run, then mean and standard deviation over the runs.

    Classifiers get a second table, in macro F1.
    """
    loss = reports[0].rows.measure == "loss"
    first = _table(reports, "perplexity", lambda row: row.perplexity) if loss else _in_shares(reports, "accuracy")
    shares = [None if report.recovered is None else 100 * report.recovered for report in reports]
    tables = [f"{first}\n| recovered, % | {_cells(shares)} |\n"]
    if reports[0].rows.full_zero_shot.f1 is not None:
        tables.append(f"{_in_shares(reports, 'f1')}\n")
    return "\n".join(tables)


def _in_shares(reports: Sequence[RunReport], field: str) -> str:
    return _table(reports, f"{field}, %", lambda row: _percent(getattr(row, field)))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _table(reports: Sequence[RunReport], name: str, number: Number) -> str:
    seeds = [" ".join(map(str, report.seeds.values())) for report in reports]
    lines = [f"| {name} | {' | '.join(f'seed {seed}' for seed in seeds)} | mean ± sd |"]
    lines.append("|---" * (len(reports) + 2) + "|")
    for key in ROW_KEYS:
        rows = [getattr(report.rows, key) for report in reports]
        lines.append(f"| {ROW_LABELS[key]} | {_cells([None if row is None else number(row) for row in rows])} |")
    return "\n".join(lines)


def _cells(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    cells = ["-" if value is None else f"{value:.1f}" for value in values]
    if len(known) < len(values) or not known:
        return " | ".join([*cells, "-"])
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return " | ".join([*cells, f"{statistics.fmean(known):.1f}{spread}"])


def main(folders: list[str]) -> int:
    """Print the table of the runs in ``folders``; 1 with the reason where one has no report."""
    try:
        text = summary([RunReport.read(Path(folder)) for folder in folders])
    except OffsiteError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 1
    Console().print(text, soft_wrap=True, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
