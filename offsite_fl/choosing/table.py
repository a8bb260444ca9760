"""The candidates as a table: in the terminal, as Markdown, and as CSV with every number."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.over_seeds import csv_cells, csv_head, part, percent, shown
from offsite_fl.choosing.standing import Standing, Verdict

UNCOMPRESSED, FULL = "uncompressed", "full fine-tuning"
_OVER_SEEDS = (
    "public_loss",
    "public_margin",
    "hidden_error",
    "cosine",
    "norm_ratio",
    "emulator_zero_shot",
    "emulator_tuned",
    "plug_in",
    "gap",
    "margin",
    "of_adapter",
    "recovered",
    "scale",
    "plug_in_scaled",
)
_PLAIN = (
    "candidate",
    "spec",
    "verdict",
    "asked_bytes",
    "bytes",
    "share",
    "verbatim_share",
    "flops_share",
    "build_seconds",
    "peak_bytes",
)


# From so many columns of a terminal on there is room for all that isn't brief, and what is left out below that.
WIDE = 120
NOT_NARROW = ("verbatim", "cosine")
# Verdicts where there is little room.
BRIEF: dict[Verdict, str] = {
    "gives the model away": "gives away",
    "gap not clear": "unclear",
    "worse than the full model": "lossy",
    "as good as the full model": "not lossy",
    "over budget": "too large",
}


@dataclass(frozen=True)
class Column:
    """A column that people read; ``reference`` is what stands there for the uncompressed middle."""

    name: str
    text: Callable[[Standing], str]
    tuned: bool = False
    brief: bool = True


COLUMNS = (
    Column("bytes", lambda s: part(s.share)),
    Column("verbatim", lambda s: part(s.verbatim_share)),
    Column("FLOPs", lambda s: part(s.flops_share), brief=False),
    Column("cosine", lambda s: shown(s.cosine)),
    Column("public loss", lambda s: shown(s.public_loss), brief=False),
    Column("lr", lambda s: "/".join(dict.fromkeys(f"{rate:g}" for rate in s.rates)), tuned=True, brief=False),
    Column("emulator zero-shot", lambda s: shown(s.emulator_zero_shot), tuned=True, brief=False),
    Column("emulator tuned", lambda s: shown(s.emulator_tuned), tuned=True),
    Column("plug-in", lambda s: shown(s.plug_in), tuned=True),
    Column("gap", lambda s: shown(s.gap), tuned=True),
    Column("of adapter", lambda s: percent(s.of_adapter), tuned=True),
    Column("recovered", lambda s: percent(s.recovered), tuned=True, brief=False),
    Column("scale", lambda s: "" if s.scale is None else f"{s.scale.mean:.3g}", tuned=True, brief=False),
    Column("plug-in scaled", lambda s: shown(s.plug_in_scaled), tuned=True, brief=False),
)


def columns_of(choice: Choice, brief: bool = False) -> tuple[Column, ...]:
    """The columns that this choice has something to say in; ``brief`` for a narrow place."""
    silent = set() if choice.full_fine_tuning is not None else {"recovered"}
    if all(standing.plug_in_scaled is None for standing in choice.standings):
        silent |= {"scale", "plug-in scaled"}
    # Where nothing was tuned the loss on public text is all that tells of protection.
    needed = set() if choice.tuned else {"public loss"}
    return tuple(
        column
        for column in COLUMNS
        if column.name not in silent
        and (choice.tuned or not column.tuned)
        and (column.brief or not brief or column.name in needed)
    )


def reference_lines(choice: Choice) -> list[tuple[str, dict[str, str]]]:
    """What candidates are set against, by the name of the column."""
    zero, best, full = choice.zero_shot, choice.uncompressed, choice.full_fine_tuning
    if zero is None or best is None:
        return [(UNCOMPRESSED, {"bytes": "100%", "public loss": f"{choice.public_loss:.3f}", "cosine": "1.000"})]
    losses = {"emulator zero-shot": f"{zero:.3f}", "emulator tuned": shown(best), "plug-in": shown(best)}
    gained = {"of adapter": "100%", "gap": "0.000", "public loss": f"{choice.public_loss:.3f}", "cosine": "1.000"}
    if full is not None and zero > full.mean:
        gained["recovered"] = f"{(zero - best.mean) / (zero - full.mean):.0%}"
    lines = [(UNCOMPRESSED, {"bytes": "100%", "FLOPs": "100%"} | losses | gained)]
    if full is not None:
        lines.append((FULL, {"plug-in": shown(full)} | ({"recovered": "100%"} if zero > full.mean else {})))
    return lines


def rich_table(choice: Choice, width: int = 80) -> Table:
    """The candidates for a terminal of ``width`` columns, best first; the recommended one is bold.

    Where there is little room means stand without their deviations, which the files have.
    """
    wide = width >= WIDE
    columns = [c for c in columns_of(choice, brief=True) if wide or not choice.tuned or c.name not in NOT_NARROW]
    table = Table(title=f"Emulators within {choice.settings.budget} of the middle", title_justify="left")
    if not wide:
        table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 0), False
    table.add_column("#", justify="right")
    table.add_column("emulator", overflow="fold", min_width=16)
    for column in columns:
        table.add_column(column.name, justify="right")
    table.add_column("verdict", no_wrap=True)
    for rank, standing in enumerate(choice.standings, start=1):
        word, style = BRIEF.get(standing.verdict, standing.verdict), "bold green" if standing is choice.best else ""
        cells = [column.text(standing) for column in columns]
        table.add_row(str(rank), Text(standing.spec), *(_fit(cell, wide) for cell in cells), word, style=style)
    for name, found in reference_lines(choice):
        table.add_row("", name, *(_fit(found.get(c.name, ""), wide) for c in columns), "", style="dim")
    return table


def _fit(text: str, wide: bool) -> Text:
    return Text(text if wide else text.partition(" ± ")[0])


def to_markdown(choice: Choice) -> str:
    """A table of GitHub's Markdown, the recommendation under it."""
    columns = columns_of(choice)
    rows = [["#", "emulator", *(column.name for column in columns), "verdict"]]
    rows.append(["---"] * len(rows[0]))
    for rank, standing in enumerate(choice.standings, start=1):
        cells = [column.text(standing) for column in columns]
        rows.append([str(rank), f"`{standing.spec}`", *cells, standing.verdict])
    for name, found in reference_lines(choice):
        rows.append(["", name, *(found.get(column.name, "") for column in columns), ""])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    taken = f"Take `{choice.best.spec}`. {choice.why}" if choice.best else choice.why
    failed = [f"- `{s.spec}`: {error}" for s in choice.standings for error in s.errors]
    return "\n".join([*lines, "", taken, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def to_csv(choice: Choice) -> str:
    """One line a candidate, best first, numbers in full; of several seeds mean and standard deviation."""
    head = ["rank", "best", *_PLAIN, "seeds", "rates", *csv_head(_OVER_SEEDS)]
    blocks = max((len(s.cosine_by_block) for s in choice.standings), default=0)
    head += [f"{kind}_block_{i}" for kind in ("cosine", "norm_ratio") for i in range(blocks)]
    out = io.StringIO()
    table = csv.DictWriter(out, [*head, "notes", "errors"], lineterminator="\n", restval="")
    table.writeheader()
    for rank, standing in enumerate(choice.standings, start=1):
        table.writerow({"rank": rank, "best": int(standing is choice.best)} | _csv_line(standing))
    return out.getvalue()


def _csv_line(standing: Standing) -> dict[str, object]:
    line: dict[str, object] = {name: getattr(standing, name) for name in _PLAIN}
    line |= {"seeds": "/".join(map(str, standing.seeds)), "rates": "/".join(f"{rate:g}" for rate in standing.rates)}
    line |= csv_cells(standing, _OVER_SEEDS)
    for kind in ("cosine", "norm_ratio"):
        line |= {f"{kind}_block_{i}": v for i, v in enumerate(getattr(standing, f"{kind}_by_block"))}
    return line | {"notes": "; ".join(standing.notes), "errors": "; ".join(standing.errors)}
