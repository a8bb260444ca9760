"""The parts of the page below the five rows. Each gives nothing where the run has nothing to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from offsite_fl.evaluation import plots
from offsite_fl.evaluation.ledger import DIRECTIONS, KINDS, Ledger
from offsite_fl.evaluation.markup import (
    Markup,
    count,
    definitions,
    duration,
    figure,
    flat,
    join,
    meters,
    plain,
    section,
    table,
    tag,
)
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import significant
from offsite_fl.sizes import human_bytes

# What the emulator's report may hold, in the order shown: its words for a reader, and the form of the number.
EMULATOR_FACTS = {
    "spec": ("emulator", "text"),
    "digest": ("digest of the bundle", "text"),
    "bytes": ("emulator's bytes", "bytes"),
    "parameters": ("emulator's parameters", "count"),
    "middle_bytes": ("bytes of the blocks it stands for", "bytes"),
    "middle_parameters": ("parameters of these blocks", "count"),
    "full_bytes": ("bytes of the full model", "bytes"),
    "hidden_error": ("relative error of the hidden states", "number"),
    "perplexity": ("perplexity on calibration text", "number"),
    "seconds": ("made in", "time"),
}
SHARES = ("verbatim_share", "flops_share")


def rounds(report: RunReport) -> Markup:
    """The curves, the bytes and the replies that were dropped."""
    rounds, rows = report.rounds, report.rows
    # Beside accuracies it is the loss of whatever is tuned there: an answer's tokens, or an example's class.
    unit = "nats per token" if rows.measure == "loss" else "nats"
    cards = [
        figure("Plug-in", "The full model with the new adapter.", plots.row_curve(rounds, rows, "plug_in")),
        figure(
            "Emulator",
            "What a data owner could keep. It protects while it stays worse than the untuned full model (dashed).",
            plots.row_curve(rounds, rows, "emulator"),
        ),
        figure("Data owners", "Training loss that each reported.", plots.client_curves(rounds, unit=unit)),
        figure(
            "Bytes",
            "Above the line to the data owners, below it back to the model owner; all nodes together.",
            plots.bytes_by_round(report.ledger),
        ),
        _replies(report),
    ]
    if not any(cards):
        return Markup()
    grid = tag("div", join(cards), class_="grid")
    shaded = " Shaded rounds had too few good replies and left the adapter as it was."
    about = "What each round changed." + (shaded if any(entry.skipped for entry in rounds) else "")
    return section("Round by round", about, grid, _traffic(report.ledger))


def _replies(report: RunReport) -> Markup:
    """The replies that were left out, with reasons; one line where there were none."""
    lines = [[entry.round, reply.node, reply.reason] for entry in report.rounds for reply in entry.dropped]
    skipped = [str(entry.round) for entry in report.rounds if entry.skipped]
    if not any(entry.clients or entry.dropped or entry.skipped for entry in report.rounds):
        return Markup()
    title = count(len(lines), "dropped reply", "dropped replies") or "No reply was dropped"
    parts = [tag("h3", title)]
    if lines:
        parts.append(table(["round", "node", "reason"], lines, text_columns=(0, 1, 2)))
    if clipped := sum(entry.clipped for entry in report.rounds):
        parts.append(tag("p", f"Updates scaled down to the bound, in all rounds: {clipped}.", class_="about"))
    if skipped:
        parts.append(tag("p", f"Too few good replies, adapter unchanged: round {', '.join(skipped)}.", class_="about"))
    return tag("div", join(parts), class_="card wide")


def _traffic(ledger: Ledger) -> Markup:
    """Exact numbers behind the bars, folded away."""
    sums, columns = ledger.totals("round", "direction", "kind"), ledger.totals("direction", "kind")
    shown = [(way, kind) for way in DIRECTIONS for kind in KINDS if (way, kind) in columns]
    if not shown:
        return Markup()
    lines = [
        [number, *(human_bytes(sums.get((number, *key), 0)) for key in shown), human_bytes(total)]
        for (number,), total in sorted(ledger.totals("round").items())
    ]
    foot = ["all", *(human_bytes(columns[key]) for key in shown), human_bytes(ledger.total())]
    by_round = table(["round", *(f"{kind} {way}" for way, kind in shown), "together"], lines, foot)
    each = ledger.totals("node", "direction")
    nodes = [
        [node, *(human_bytes(each.get((node, way), 0)) for way in DIRECTIONS)] for (node,) in ledger.totals("node")
    ]
    parts = (tag("summary", "Bytes in numbers"), by_round, table(["node", "down", "up"], nodes))
    return tag("details", join(parts))


def left_the_house(report: RunReport) -> Markup:
    """What the model owner gave away: the bundle by content, and what the emulator is."""
    found = dict(report.emulator)
    if not found:
        return Markup()
    cards = [_bundle(found), _shares(found)]
    found.pop("bundle_bytes", None)
    facts = {
        EMULATOR_FACTS[key][0]: _form(found[key], EMULATOR_FACTS[key][1])
        for key in EMULATOR_FACTS
        if found.get(key) is not None
    }
    facts |= {
        key.replace("_", " "): plain(value)
        for key, value in flat(found).items()
        if key not in {*EMULATOR_FACTS, *SHARES}
    }
    listed = join((tag("h3", "The emulator"), tag("div", definitions(facts), class_="two")))
    cards.append(tag("div", listed, class_="card wide"))
    about = "What every data owner received and may keep. Nothing else of the full model leaves its owner."
    return section("What left the house", about, tag("div", join(cards), class_="grid"))


def _number(value: Any) -> float | None:
    """``value`` if it is a finite number: a report may come from a file that somebody edited."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _sizes(found: Mapping[str, Any]) -> dict[str, float]:
    kinds = found.get("bundle_bytes")
    sizes = {str(k): _number(v) for k, v in kinds.items()} if isinstance(kinds, Mapping) else {}
    return {name: size for name, size in sizes.items() if size is not None}


def _bundle(found: Mapping[str, Any]) -> Markup:
    """Bytes of the bundle by what they are."""
    sizes = _sizes(found)
    if not sizes:
        return Markup()
    bars = meters(sizes, {name: human_bytes(size) for name, size in sizes.items()})
    about = tag("p", f"{human_bytes(sum(sizes.values()))} in all.", class_="about")
    return tag("div", join((tag("h3", "The bundle"), about, bars)), class_="card")


def _shares(found: Mapping[str, Any]) -> Markup:
    """How much that is, measured on the full model and on the blocks that the emulator stands for."""

    def share(one: Any, other: Any = 1.0) -> float | None:
        above, below = _number(one), _number(other)
        return above / below if above is not None and below else None

    shares = {
        "bundle, of the full model's bytes": share(sum(_sizes(found).values()) or None, found.get("full_bytes")),
        "left verbatim, of the full model": share(found.get("verbatim_share")),
        "emulator, of the bytes it stands for": share(found.get("bytes"), found.get("middle_bytes")),
        "emulator, of their forward cost": share(found.get("flops_share")),
    }
    known = {name: part for name, part in shares.items() if part is not None}
    if not known:
        return Markup()
    about = tag("p", "Bars: of 100%.", class_="about")
    bars = meters(known, {name: f"{part:.1%}" for name, part in known.items()}, most=1.0)
    return tag("div", join((tag("h3", "Shares"), about, bars)), class_="card")


def _form(value: Any, form: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    forms: dict[str, Callable[[float], str]] = {"bytes": human_bytes, "number": significant, "time": duration}
    return forms[form](value) if form in forms else f"{value:,}"


def data(parts: Mapping[str, Mapping[str, Any]]) -> Markup:
    """How the data are split: one line a part."""
    if not parts:
        return Markup()
    columns = list(dict.fromkeys(key for part in parts.values() for key in part))
    words = [i for i, key in enumerate(columns, 1) if any(isinstance(part.get(key), str) for part in parts.values())]
    lines = [[name, *(_cell(part.get(key)) for key in columns)] for name, part in parts.items()]
    head = ["", *(key.replace("_", " ") for key in columns)]
    card = tag("div", table(head, lines, text_columns=(0, *words)), class_="card")
    return section("Data", "Who holds what, and what the rows are measured on.", card)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def fine_print(report: RunReport) -> Markup:
    """Notes, time by stage, settings, seeds and versions."""
    cards = []
    if report.notes:
        notes = tag("ul", join(tag("li", note) for note in report.notes), class_="notes")
        cards.append(tag("div", join((tag("h3", "Notes"), notes)), class_="card wide"))
    small = []
    if report.seconds:
        shown = {name: duration(value) for name, value in report.seconds.items()}
        about = tag("p", f"{duration(sum(report.seconds.values()))} in all.", class_="about")
        small.append(tag("div", join((tag("h3", "Time"), about, meters(report.seconds, shown))), class_="card"))
    if report.seeds:
        small.append(tag("div", join((tag("h3", "Seeds"), definitions(report.seeds))), class_="card"))
    if small:
        cards.append(tag("div", join(small), class_="stack"))
    if report.versions:
        cards.append(tag("div", join((tag("h3", "Versions"), definitions(report.versions))), class_="card"))
    if report.config:
        settings = join((tag("h3", "Configuration"), tag("div", definitions(flat(report.config)), class_="two")))
        cards.append(tag("div", settings, class_="card wide"))
    return section("How it was made", "", tag("div", join(cards), class_="grid")) if cards else Markup()


def glossary() -> Markup:
    """What the words of the page mean."""
    words = (
        "Adapter: the few blocks of the model that are tuned by the data owners. Emulator: the compressed, frozen "
        "stand-in for all other blocks. Plug-in: the full model with the tuned adapter.",
        "Gap: how much better the plug-in is than the tuned emulator, which is what a data owner could keep. "
        "Recovered: the plug-in's gain on the untuned model as a share of full fine-tuning's gain, in log-perplexity "
        "or accuracy.",
    )
    return tag("footer", join(tag("p", text) for text in words))
