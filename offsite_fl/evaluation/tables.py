"""A report in the terminal, and as the JSON that ``--json`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from offsite_fl.evaluation.ledger import DIRECTIONS, KINDS, Ledger
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS, ROW_LABELS, FiveRows, Row, significant, verdict
from offsite_fl.sizes import human_bytes


def rows_table(rows: FiveRows) -> Table:
    """The five rows with what each gains on the untuned full model, gap and recovered below."""
    table = Table(title="The five rows", title_justify="left", caption=_caption(rows), caption_justify="left")
    table.add_column("")
    names = ["loss (nats/token)", "perplexity"] if rows.measure == "loss" else ["accuracy"]
    names += ["macro F1"] if rows.has_f1 else []
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("better by", justify="right")
    for key in ROW_KEYS:
        row: Row | None = getattr(rows, key)
        style = "bold" if key == "plug_in" else ""
        cells = ["not run"] * len(names) + [""] if row is None else _cells(row, rows)
        table.add_row(ROW_LABELS[key], *cells, style=style)
    return table


def _cells(row: Row, rows: FiveRows) -> list[str]:
    gain = row.score - rows.full_zero_shot.score
    if row.loss is None:
        f1 = ["-" if row.f1 is None else f"{row.f1:.1%}"] if rows.has_f1 else []
        return [f"{row.value:.1%}", *f1, "" if row is rows.full_zero_shot else f"{100 * gain:+.1f} points"]
    return [
        f"{row.loss:.4f}",
        significant(row.perplexity),
        "" if row is rows.full_zero_shot else f"{gain:+.4f} nats",
    ]


def _caption(rows: FiveRows) -> Text:
    gap, recovered = rows.gap, rows.recovered
    scale, unit = (1, "nats/token") if rows.measure == "loss" else (100, "points")
    first = "gap -" if gap is None else f"gap {scale * gap:+.{4 if scale == 1 else 1}f} {unit}"
    second = "recovered -" if recovered is None else f"recovered {recovered:.1%}"
    said = verdict(rows)
    return Text(f"{first}, {second}\n{said.gain}\n{said.protection}", style="not italic")


def bytes_table(ledger: Ledger) -> Table:
    """Bytes by round, with one column for each kind and direction that occurs."""
    table = Table(title="Bytes on the wire, all nodes together", title_justify="left", show_footer=True)
    sums, columns = ledger.totals("round", "direction", "kind"), ledger.totals("direction", "kind")
    table.add_column("round", footer="all", justify="right")
    shown = [(d, k) for d in DIRECTIONS for k in KINDS if (d, k) in columns]
    for direction, kind in shown:
        footer = human_bytes(columns[direction, kind])
        table.add_column(f"{kind} {direction}", footer=footer, justify="right")
    table.add_column("together", footer=human_bytes(ledger.total()), justify="right")
    for (number,), total in sorted(ledger.totals("round").items()):
        cells = [human_bytes(sums.get((number, *column), 0)) for column in shown]
        table.add_row(str(number), *cells, human_bytes(total))
    return table


def print_report(report: RunReport, console: Console | None = None) -> None:
    """Print the five rows, the bytes, and the replies that were dropped."""
    console = console or Console()
    console.print(rows_table(report.rows))
    if len(report.ledger):
        console.print(bytes_table(report.ledger))
    for entry in report.rounds:
        if entry.skipped:
            console.print(f"round {entry.round}: too few good replies, the adapter stayed as it was", style="yellow")
        if entry.clipped:
            console.print(f"round {entry.round}: {entry.clipped} updates scaled down to the bound", style="yellow")
        for reply in entry.dropped:
            console.print(f"round {entry.round}: dropped {escape(reply.node)}: {escape(reply.reason)}", style="yellow")
    for note in report.notes:
        console.print(f"note: {escape(note)}")


def summary(report: RunReport) -> dict[str, Any]:
    """The short form for ``--json``: rows, gap, recovered, verdict, and bytes by direction and kind."""
    said = verdict(report.rows)
    sums = report.ledger.totals("direction", "kind")
    return {
        "rows": report.rows.to_dict(),
        "gap": report.gap,
        "recovered": report.recovered,
        "verdict": {"gain": said.gain, "protection": said.protection, "protected": said.protected},
        "bytes": {d: {k: sums[d, k] for k in KINDS if (d, k) in sums} for d in DIRECTIONS},
        "rounds": len([entry for entry in report.rounds if entry.round > 0]),
        "dropped": sum(len(entry.dropped) for entry in report.rounds),
        "seconds": sum(report.seconds.values()),
    }
