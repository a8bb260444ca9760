"""The result as a table: for people, as CSV with every number, and as LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from offsite_fl.choosing.over_seeds import csv_cells, csv_head, percent, shown
from offsite_fl.comparing.cells import Condition
from offsite_fl.comparing.summary import Standing, Summary
from offsite_fl.evaluation.markup import duration
from offsite_fl.sizes import human_bytes

_OVER_SEEDS = ("plug_in", "emulator", "gap", "recovered", "worst", "spread")
_MEANS = ("down", "up", "seconds", "peak")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "\N{PLUS-MINUS SIGN}": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column that people read; brief ones fit into a terminal and a page of paper."""

    name: str
    text: Callable[[Standing], str]
    brief: bool = True


def _bytes(value: float | None) -> str:
    return human_bytes(round(value)) if value else ""


COLUMNS = (
    Column("plug-in", lambda s: shown(s.plug_in)),
    Column("emulator tuned", lambda s: shown(s.emulator), brief=False),
    Column("gap", lambda s: shown(s.gap)),
    Column("recovered", lambda s: percent(s.recovered)),
    Column("worst client", lambda s: shown(s.worst)),
    Column("spread", lambda s: shown(s.spread), brief=False),
    Column("down", lambda s: _bytes(s.down), brief=False),
    Column("up", lambda s: _bytes(s.up)),
    Column("client time", lambda s: "" if s.seconds is None else duration(s.seconds)),
    Column("memory", lambda s: _bytes(s.peak), brief=False),
)


def title_of(condition: Condition, summary: Summary) -> str:
    """A condition in words; what is the same in the whole grid is left out."""
    axes = summary.settings.grid
    parts = [condition.partition or ""]
    if len(axes.clients) > 1:
        parts.append(f"{condition.clients} clients")
    if len(axes.fractions) > 1:
        parts.append(f"{condition.fraction:.0%} of clients a round")
    if len(axes.attacks) > 1:
        parts.append(f"under {condition.attack}" if condition.attack else "honest clients")
    return ", ".join(parts)


def rich_tables(summary: Summary) -> list[Table]:
    """One table a condition for the terminal, best first; means and deviations over seeds."""
    tables = []
    for condition, standings in summary.by_condition.items():
        table = Table(title=Text(title_of(condition, summary)), title_justify="left")
        several = len(summary.settings.grid.emulators) > 1
        for name in ("", *(["emulator"] if several else [])):
            table.add_column(name, overflow="fold")
        columns = [column for column in COLUMNS if column.brief]
        for column in columns:
            table.add_column(column.name, justify="right")
        for standing in standings:
            heads = [Text(standing.arm.label), *([Text(standing.arm.emulator)] if several else [])]
            cells = [column.text(standing) for column in columns]
            if standing.plug_in is None:
                cells[0] = "failed"
            table.add_row(*heads, *cells, style="" if standing.arm.role == "strategy" else "dim")
        tables.append(table)
    return tables


def to_csv(summary: Summary) -> str:
    """One line an arm and condition, best first, numbers in full; of several seeds mean and standard deviation."""
    out = io.StringIO()
    head = ["partition", "clients", "fraction", "attack", "role", "strategy", "emulator", "seeds"]
    head += [*csv_head(_OVER_SEEDS), *_MEANS, "errors"]
    table = csv.DictWriter(out, head, lineterminator="\n", restval="")
    table.writeheader()
    for condition, standings in summary.by_condition.items():
        for standing in standings:
            table.writerow(vars(condition) | vars(standing.arm) | _numbers(standing))
    return out.getvalue()


def _numbers(standing: Standing) -> dict[str, object]:
    seeds = "/".join(str(found.cell.seed) for found in standing.measured)
    line: dict[str, object] = {"seeds": seeds, "errors": "; ".join(standing.errors)}
    line |= csv_cells(standing, _OVER_SEEDS)
    return line | {name: value for name in _MEANS if (value := getattr(standing, name)) is not None}


def to_latex(summary: Summary) -> str:
    """A tabular for the booktabs package, the conditions below each other, the best strategy of each in bold."""
    columns = [column for column in COLUMNS if column.brief]
    several = len(summary.settings.grid.emulators) > 1
    heads = ["", *(["emulator"] if several else []), *(column.name for column in columns)]
    lines = [r"\begin{tabular}{l" + "l" * several + "r" * len(columns) + "}", r"\toprule", _row(map(latex, heads))]
    for condition, standings in summary.by_condition.items():
        lines += [
            r"\midrule",
            rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{latex(title_of(condition, summary))}}}}} \\",
        ]
        best = next((s for s in standings if s.arm.role == "strategy" and s.plug_in is not None), None)
        for standing in standings:
            cells = [standing.arm.label, *([standing.arm.emulator] if several else [])]
            done = [latex(cell) for cell in (*cells, *(column.text(standing) for column in columns))]
            lines.append(_row(rf"\textbf{{{cell}}}" if standing is best and cell else cell for cell in done))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _row(cells: Sequence[str] | object) -> str:
    return " & ".join(cells) + r" \\"  # type: ignore[arg-type]


def latex(text: str) -> str:
    """``text`` with what LaTeX would read as commands escaped.

    >>> latex("fedadam:beta-1=0.9_x 50%")
    'fedadam:beta-1=0.9\\\\_x 50\\\\%'
    """
    return "".join(_LATEX.get(letter, letter) for letter in text)
