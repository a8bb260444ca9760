"""The candidates as a table: in the terminal, as Markdown, and as CSV with every number."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.over_seeds import csv_cells, csv_head, part, percent, shown
from offsite_fl.choosing.standing import Figures, Standing, Verdict
from offsite_fl.choosing.yardstick import Yardstick
from offsite_fl.evaluation.markup import duration

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
    "gain",
    "gap",
    "margin",
    "of_adapter",
    "recovered",
    "scale",
    "plug_in_scaled",
    "without_repair",
)
_FIGURES = tuple(field.name for field in dataclasses.fields(Figures))
_ACCURACY = "accuracy_"
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


# From so many columns of a terminal on there is room for everything, and for all that is brief.
ROOMY = 200
WIDE = 120
# What is left out below that.
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
    """A column that people read; one that isn't ``brief`` only where there is room."""

    name: str
    text: Callable[[Standing], str]
    brief: bool = True


_OF_ALL = (
    Column("bytes", lambda s: part(s.share)),
    Column("verbatim", lambda s: part(s.verbatim_share)),
    Column("FLOPs", lambda s: part(s.flops_share), brief=False),
    Column("built in", lambda s: "" if s.build_seconds is None else duration(s.build_seconds), brief=False),
    Column("cosine", lambda s: shown(s.cosine)),
    Column("norm ratio", lambda s: shown(s.norm_ratio), brief=False),
    Column("public loss", lambda s: shown(s.public_loss), brief=False),
)
_RATE = Column("lr", lambda s: "/".join(dict.fromkeys(f"{rate:g}" for rate in s.rates)), brief=False)


def _figures(by: Yardstick) -> tuple[Column, ...]:
    """What tuning was worth, in what candidates are judged in."""
    return (
        Column("emulator zero-shot", lambda s: by.level(s.figures(by).emulator_zero_shot), brief=False),
        Column("emulator tuned", lambda s: by.level(s.figures(by).emulator_tuned)),
        Column("plug-in", lambda s: by.level(s.figures(by).plug_in)),
        Column("gap", lambda s: by.step(s.figures(by).gap)),
        Column("of adapter", lambda s: percent(s.figures(by).of_adapter)),
        Column("recovered", lambda s: percent(s.figures(by).recovered), brief=False),
        Column("less repair", lambda s: by.level(s.figures(by).without_repair), brief=False),
    )


def beside(choice: Choice) -> tuple[Column, ...]:
    """The most of it in the numbers that candidates aren't judged in."""
    _, *others = choice.settings.kind.yardsticks
    return tuple(column for by in others for column in _in_another(by)) if choice.tuned else ()


def _in_another(by: Yardstick) -> tuple[Column, ...]:
    return (
        Column(f"emulator tuned, {by.name}", lambda s: by.level(s.figures(by).emulator_tuned), brief=False),
        Column(f"plug-in, {by.name}", lambda s: by.level(s.figures(by).plug_in), brief=False),
        Column(f"gap, {by.name}", lambda s: by.step(s.figures(by).gap), brief=False),
    )


def _scaled(by: Yardstick) -> tuple[Column, ...]:
    name = "plug-in scaled" if by.name == "loss" else "plug-in scaled, loss"
    return (
        Column("scale", lambda s: "" if s.scale is None else f"{s.scale.mean:.3g}", brief=False),
        Column(name, lambda s: shown(s.plug_in_scaled), brief=False),
    )


def columns_of(choice: Choice, brief: bool = False) -> tuple[Column, ...]:
    """The columns that this choice has something to say in; ``brief`` for a narrow place."""
    # Where nothing was tuned the loss on public data is all that tells of protection.
    needed, silent, columns = {"public loss"}, set(), list(_OF_ALL)
    if choice.tuned:
        needed, judged = set(), choice.settings.kind.judged_in
        columns += [_RATE, *_figures(judged), *beside(choice)]
        silent |= set() if choice.full_fine_tuning is not None else {"recovered"}
        silent |= set() if choice.settings.repair else {"less repair"}
        if any(standing.plug_in_scaled is not None for standing in choice.standings):
            columns += _scaled(judged)
    return tuple(
        column
        for column in columns
        if column.name not in silent and (column.brief or not brief or column.name in needed)
    )


def reference_lines(choice: Choice) -> list[tuple[str, dict[str, str]]]:
    """What candidates are set against, by the name of the column."""
    best = {"bytes": "100%", "FLOPs": "100%", "cosine": "1.000", "norm ratio": "1.000"}
    best["public loss"] = f"{choice.public_loss:.3f}"
    full: dict[str, str] = {}
    if not choice.tuned:
        return [(UNCOMPRESSED, best)]
    judged, *others = choice.settings.kind.yardsticks
    for by in (judged, *others):
        found, name = choice.references(by), "" if by is judged else f", {by.name}"
        reached = by.level(found.uncompressed)
        best |= {f"emulator tuned{name}": reached, f"plug-in{name}": reached, f"gap{name}": by.told_step(0.0)}
        full[f"plug-in{name}"] = by.level(found.full_fine_tuning)
    found = choice.references(judged)
    assert found.zero_shot is not None and found.uncompressed is not None
    best |= {"emulator zero-shot": judged.told(found.zero_shot), "of adapter": "100%"}
    if found.full_fine_tuning is None:
        return [(UNCOMPRESSED, best)]
    most = judged.behind(found.zero_shot, found.full_fine_tuning.mean)
    if most > 0:
        best["recovered"] = f"{judged.behind(found.zero_shot, found.uncompressed.mean) / most:.0%}"
        full["recovered"] = "100%"
    return [(UNCOMPRESSED, best), (FULL, full)]


def rich_table(choice: Choice, width: int = 80) -> Table:
    """The candidates for a terminal of ``width`` columns, best first; the recommended one is bold.

    Where there is little room means stand without their deviations, which the files have.
    """
    wide = width >= WIDE
    columns = [
        column
        for column in columns_of(choice, brief=width < ROOMY)
        if wide or not choice.tuned or column.name not in NOT_NARROW
    ]
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
    if choice.accuracy is not None:
        head += [_ACCURACY + name for name in csv_head(_FIGURES)]
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
    if standing.accuracy is not None:
        line |= {_ACCURACY + name: value for name, value in csv_cells(standing.accuracy, _FIGURES).items()}
    for kind in ("cosine", "norm_ratio"):
        line |= {f"{kind}_block_{i}": v for i, v in enumerate(getattr(standing, f"{kind}_by_block"))}
    return line | {"notes": "; ".join(standing.notes), "errors": "; ".join(standing.errors)}
