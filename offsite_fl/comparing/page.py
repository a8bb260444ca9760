"""compare.html: one file that tells which strategy leads, how sure that is, what it costs, and who held what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offsite_fl.choosing.over_seeds import shown
from offsite_fl.comparing.cells import Condition
from offsite_fl.comparing.curves import AGAINST, curve, holdings
from offsite_fl.comparing.partitions import describe, parse_partition
from offsite_fl.comparing.summary import Lead, Standing, Summary
from offsite_fl.comparing.table import COLUMNS, title_of
from offsite_fl.config import to_mapping
from offsite_fl.evaluation import plots
from offsite_fl.evaluation.markup import (
    Markup,
    count,
    definitions,
    duration,
    figure,
    join,
    kicker,
    plain,
    safe,
    section,
    stacked,
    tag,
    tiles,
)
from offsite_fl.evaluation.markup import table as html_table
from offsite_fl.evaluation.page import document
from offsite_fl.evaluation.rows import significant
from offsite_fl.sizes import human_bytes

STYLE = """
code { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
h1 code { font-size: .8em; font-weight: 600; letter-spacing: 0; } .card table { font-size: .89rem; }
.note { display: block; color: var(--muted); font-size: .82rem; } .three { grid-template-columns: repeat(3, 1fr); }
.arms tr > th:first-child { min-width: 9rem; }
.card + .grid { margin-top: 1.1rem; } .ref, .ref + td { color: var(--muted); }
@media (max-width: 820px) { .three { grid-template-columns: minmax(0, 1fr); } }
"""
SURE = 0.05
Holdings = Mapping[tuple[str, int], Mapping[str, Mapping[str, int]]]


def render_comparison(summary: Summary, held: Holdings, versions: Mapping[str, str]) -> str:
    """The whole page. ``held`` has characters by client and domain for each partition and number of clients."""
    plots.require_matplotlib()
    parts = [_header(summary), _overall(summary), _who_holds_what(summary, held)]
    parts += [
        _condition(condition, standings, summary, f"k{number}")
        for number, (condition, standings) in enumerate(summary.by_condition.items())
    ]
    parts += [_failed(summary), _made(summary, versions), _glossary()]
    head = f"{summary.lead.best.label} leads" if summary.lead else "nothing measured"
    return document(f"offsite_fl: {head}", join(parts), STYLE)


def sentence(lead: Lead | None) -> str:
    """What the paired test says, in words."""
    if lead is None:
        return "No strategy has a result yet."
    if lead.second is None or lead.paired is None:
        return "There is no second strategy to set it against."
    paired, pairs = lead.paired, count(len(lead.paired.differences), "pair")
    more = "" if lead.best.emulator == lead.second.emulator else f" on {lead.second.emulator}"
    return (
        f"Against the second, {lead.second.label}{more}, its loss is lower by {significant(paired.mean)} nats per "
        f"token, in {paired.wins} of {pairs} of condition and seed (exact sign-flip test on the pairs: p = "
        f"{significant(paired.p, 2)}, two-sided)."
    )


def verdict(lead: Lead | None) -> tuple[str, str]:
    """The chip before the sentence and its style."""
    if lead is None or lead.paired is None:
        return ("no test", "chip")
    if lead.paired.p <= SURE:
        return ("clear", "chip good")
    least = 2.0 ** (1 - len(lead.paired.differences))
    return ("too few pairs to tell" if least > SURE else "not clear", "chip bad")


def _header(summary: Summary) -> Markup:
    axes, lead = summary.settings.grid, summary.lead
    facts = [summary.settings.model.path.rpartition("/")[2], count(len(axes.strategies), "strategy", "strategies")]
    facts += [count(len(axes.emulators), "emulator"), count(len(axes.partitions), "partition")]
    facts += [count(len(axes.seeds), "seed"), count(axes.rounds, "round")]
    head: Markup = safe("Nothing measured yet.")
    if lead is not None:
        head = join((tag("code", lead.best.label), safe(" leads" if lead.second else " stands alone")))
    word, style = verdict(lead)
    text = tag("p", join((tag("span", word, class_=style), safe(sentence(lead)))), class_="lead")
    numbers = _tiles(summary, lead) if lead else Markup()
    return tag("header", join((kicker(facts), tag("h1", head), text, numbers)))


def _tiles(summary: Summary, lead: Lead) -> Markup:
    own = [s for found in summary.by_condition.values() for s in found if s.arm == lead.best and s.measured]
    zero = "" if summary.zero_shot is None else f"nats per token; {summary.zero_shot:.3f} untuned"
    found = [("Plug-in", f"{lead.loss:.3f}", zero or "nats per token")]
    shares = [s.recovered.mean for s in own if s.recovered]
    if shares:
        found.append(("Recovered", f"{sum(shares) / len(shares):.0%}", "of full fine-tuning's gain"))
    gaps = [s.gap.mean for s in own if s.gap]
    if gaps:
        found.append(("Gap", f"{sum(gaps) / len(gaps):.3f}", "nats that the tuned emulator stays behind the plug-in"))
    sent = [(s.down or 0.0) + (s.up or 0.0) for s in own]
    seconds = [s.seconds or 0.0 for s in own]
    if own:
        mean = human_bytes(round(sum(sent) / len(sent)))
        found.append(("Sent", mean, f"a run, bundle included; {duration(sum(seconds) / len(own))} of client time"))
    return tiles(found)


def _overall(summary: Summary) -> Markup:
    """Strategies by conditions, where there are several of both."""
    if len(summary.by_condition) < 2 or not summary.overall:
        return Markup()
    lines = []
    for rank, (arm, mean) in enumerate(summary.overall, start=1):
        cells = []
        for standings in summary.by_condition.values():
            found = next((s for s in standings if s.arm == arm), None)
            cells.append(_filled(shown(found.plug_in if found else None)))
        lines.append([str(rank), tag("code", arm.label), tag("code", arm.emulator), f"{mean.mean:.3f}", *cells])
    heads = ["", "strategy", "emulator", "mean", *(title_of(c, summary) for c in summary.by_condition)]
    done = html_table(heads, lines, text_columns=(0, 1, 2))
    about = (
        "The plug-in's loss on the held-out text, nats per token, mean and standard deviation over seeds. The mean in "
        "the fourth column is over all conditions and seeds that every strategy here has."
    )
    return section("All conditions", about, tag("div", done, class_="card"))


def _who_holds_what(summary: Summary, held: Holdings) -> Markup:
    cards = []
    for number, ((partition, clients), characters) in enumerate(held.items()):
        title = partition if len(summary.settings.grid.clients) == 1 else f"{partition}, {clients} clients"
        plot = holdings(characters, summary.settings.data.owners, f"h{number}")
        cards.append(figure(title, describe(parse_partition(partition)), plot))
    if not cards:
        return Markup()
    about = f"Text by client and domain with seed {summary.settings.grid.seeds[0]}. Every passage is with one client."
    return section("Who holds what", about, tag("div", join(cards), class_="grid"))


def _condition(condition: Condition, standings: Sequence[Standing], summary: Summary, name: str) -> Markup:
    if not any(standing.measured for standing in standings):
        return Markup()
    several = len(summary.settings.grid.emulators) > 1
    lines: list[list[object]] = []
    for standing in standings:
        own = standing.arm.role == "strategy"
        heads: list[object] = [
            tag("code", standing.arm.label) if own else tag("span", standing.arm.label, class_="ref")
        ]
        heads += [tag("code", standing.arm.emulator) if standing.arm.emulator else ""] if several else []
        cells = [_filled(column.text(standing)) for column in COLUMNS]
        if standing.plug_in is None:
            cells[0] = tag("span", "failed", class_="chip bad")
        lines.append([*heads, *cells])
    titles = ["", *(["emulator"] if several else []), *(column.name for column in COLUMNS)]
    done = html_table(titles, lines, text_columns=(0, 1) if several else (0,))
    pictures = [
        figure(f"By {against}", "", curve(summary, standings, against, f"{name}{number}"))
        for number, against in enumerate(AGAINST)
    ]
    seeds = len(summary.settings.grid.seeds)
    about = "Best first; references in grey." + (" Mean and standard deviation over seeds." if seeds > 1 else "")
    drawn = sum(standing.arm.role == "strategy" and standing.plug_in is not None for standing in standings)
    about += f" The curves are those of the best {plots.MANY} of {drawn}." if drawn > plots.MANY else ""
    return section(
        title_of(condition, summary),
        about,
        tag("div", done, class_="card"),
        tag("div", join(pictures), class_="grid three"),
    )


def _filled(text: str) -> object:
    """A number as the tables have it; a cell without one stays empty."""
    return stacked(text) if text else ""


def _failed(summary: Summary) -> Markup:
    lines = [[tag("code", found.cell.label), found.error or ""] for found in summary.failed]
    if not lines:
        return Markup()
    done = html_table(["cell", "why"], lines, text_columns=(0, 1))
    return section("Failed", "The same command tries them again.", tag("div", done, class_="card"))


def _made(summary: Summary, versions: Mapping[str, str]) -> Markup:
    settings = summary.settings
    shown_as: dict[str, object] = {}
    for part in ("model", "data", "grid", "test", "baselines"):
        shown_as |= {f"{part}.{key}": plain(value) for key, value in to_mapping(getattr(settings, part)).items()}
    default = to_mapping(type(settings.tune)())
    shown_as |= {f"tune.{k}": plain(v) for k, v in to_mapping(settings.tune).items() if v != default[k]}
    for spec, more in settings.tune_for.items():
        shown_as[f"tune-for.{spec}"] = ", ".join(f"{key}={plain(value)}" for key, value in more.items())
    cards = [
        tag("div", join((tag("h3", title), tag("div", definitions(values), class_="two"))), class_="card wide")
        for title, values in (("Settings", shown_as), ("Versions", dict(versions)))
        if values
    ]
    missing = f"{count(summary.missing, 'cell')} of the grid not measured yet." if summary.missing else ""
    return section("How it was made", missing, tag("div", join(cards), class_="grid"))


def _glossary() -> Markup:
    words = [
        "Plug-in: loss of the full model with the adapter that was tuned on the emulator, on held-out text. Gap: the "
        "tuned emulator's loss minus the plug-in's. Recovered: the plug-in's gain as a share of full fine-tuning's.",
        "Worst client, spread: each client's loss is that of the shared plug-in on its own mixture of domains (the "
        "held-out text of each domain weighted by what the client holds of it); the worst of them, and their standard "
        "deviation. Strategies that give each client an adapter of its own are judged by the shared one only.",
        "Down, up: bytes of all clients together in a whole run, the bundle once a client. Client time: seconds that "
        "all clients together spent tuning, which depends on what else the machine did. Memory: the most that tuning "
        "took in a client beyond what its process held before.",
        "References get as many steps as the federation: each client alone as many as it has there, the pooled ones as "
        "many over the examples of all clients. LoRA on the full model is federated by fedavg in all blocks but the "
        "middle one, which is frozen and uncompressed. There and on the uncompressed model clients hold it all.",
        "The test: under no difference each pair's sign could be either. With n pairs p can't be below 2 to the power "
        "of 1 - n. Pairs of one seed share their data, so they are not wholly independent.",
    ]
    return tag("footer", join(tag("p", word) for word in words))
