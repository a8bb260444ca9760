"""One HTML file that tells a run: no script, nothing to fetch, whatever stands in the report is escaped."""

from __future__ import annotations

import math

from offsite_fl.evaluation import answers, plots, sections
from offsite_fl.evaluation.ledger import DIRECTIONS
from offsite_fl.evaluation.markup import Markup, count, duration, join, kicker, safe, tag, tiles
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS, ROW_LABELS, FiveRows, Row, noun, show, verdict
from offsite_fl.evaluation.style import STYLE
from offsite_fl.sizes import human_bytes

# Nothing may be fetched or run, even if a string should ever slip through unescaped.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
PICTURES = "; img-src data:"  # beside that, on pages that hold pictures: those in the page itself
CHIPS = {True: ("protected", "chip good"), False: ("not protected", "chip bad"), None: ("unknown", "chip")}
ROW_COLORS = dict(zip(ROW_KEYS, ("zero", "emulator", "emulator", "plug", "full"), strict=True))


def render_page(report: RunReport) -> str:
    """The whole page. Parts that a run has nothing to say about are left out."""
    plots.require_matplotlib()
    said = verdict(report.rows)
    body = join(
        (
            _header(report),
            _rows(report.rows),
            answers.samples(report.samples),
            sections.rounds(report),
            sections.left_the_house(report),
            sections.data(report.data),
            sections.fine_print(report),
            sections.glossary(),
        )
    )
    pictures = any(sample.image for sample in report.samples)
    return document(f"offsite_fl: {said.gain.split(' (')[0].rstrip('.')}", body, pictures=pictures)


def document(title: str, body: Markup, style: str = "", *, pictures: bool = False) -> str:
    """A whole HTML file around ``body``: the style sheet, ``style`` after it, and a policy that fetches nothing.

    With ``pictures`` the policy lets those be shown that stand in the page as data.
    """
    head = join(
        (
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}{PICTURES if pictures else ""}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            tag("title", title),
            tag("style", Markup(STYLE + style)),
        )
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{tag("main", body)}\n</body>\n</html>\n'
    )


def _header(report: RunReport) -> Markup:
    said = verdict(report.rows)
    word, style = CHIPS[said.protected]
    clients = {name for entry in report.rounds for name in entry.clients}
    rounds = [entry for entry in report.rounds if entry.round > 0]
    facts = [report.config.get("model"), count(len(clients), "data owner"), count(len(rounds), "round")]
    facts.append(report.emulator.get("spec"))
    protection = said.protection.partition(": ")[2] or said.protection
    parts = (
        kicker([fact for fact in facts if fact] or ["report of a run"]),
        tag("h1", _brief(said.gain)),
        tag("p", join((tag("span", word, class_=style), safe(protection[0].upper() + protection[1:]))), class_="lead"),
        _tiles(report),
    )
    return tag("header", join(parts))


def _brief(sentence: str) -> str:
    """A sentence of the verdict without the numbers in brackets, which the page shows elsewhere."""
    return sentence.partition(" (")[0].rstrip(".") + "."


def _tiles(report: RunReport) -> Markup:
    rows, ledger = report.rows, report.ledger
    zero, plug, full = rows.full_zero_shot, rows.plug_in, rows.full_fine_tuning
    after = f"; {show(full)} with full fine-tuning" if full else ""
    found = [(f"Plug-in {noun(plug)}", show(plug), f"{show(zero)} untuned{after}")]
    share = "of full fine-tuning's gain" if rows.recovered is not None else "can't be told from these rows"
    share = share if full else "full fine-tuning was not run"
    found.append(("Recovered", "-" if rows.recovered is None else f"{rows.recovered:.0%}", share))
    unit, scale = ("nats", 1) if rows.measure == "loss" else ("points", 100)
    gap = "-" if rows.gap is None else f"{scale * rows.gap:.3g} {unit}"
    found.append(("Gap", gap, f"plug-in over tuned emulator, whose {noun(plug)} is {show(rows.emulator_tuned)}"))
    if len(ledger):
        down, up = (human_bytes(ledger.total(direction=way)).replace(" ", "\N{NO-BREAK SPACE}") for way in DIRECTIONS)
        found.append(("Sent", human_bytes(ledger.total()), f"{down} to the data owners, {up} back"))
    elif report.seconds:
        found.append(("Time", duration(sum(report.seconds.values())), "all stages together"))
    return tiles(found)


def _rows(rows: FiveRows) -> Markup:
    loss = rows.measure == "loss"
    gains = {key: row.score - rows.full_zero_shot.score for key, row in rows}
    finite = [gain for gain in gains.values() if math.isfinite(gain)]
    ahead, behind = max([0.0, *finite]), -min([0.0, *finite])
    scale = 100 / ((ahead + behind) or 1)
    lines = []
    for key in ROW_KEYS:
        row: Row | None = getattr(rows, key)
        cells = [tag("td", number, class_="n") for number in _numbers(row, loss, rows.has_f1)]
        bar = Markup() if row is None else _bar(gains[key], behind * scale, scale, ROW_COLORS[key], loss)
        head = tag("th", ROW_LABELS[key], scope="row")
        lines.append(tag("tr", join((head, *cells, tag("td", bar, class_="bar"))), class_=key))
    names = ["perplexity", "nats/token"] if loss else ["accuracy", *(["macro F1"] if rows.has_f1 else [])]
    side = join((tag("span", "worse than untuned"), tag("span", "better")))
    titles = [tag("th", "", scope="col"), *(tag("th", name, scope="col", class_="n") for name in names)]
    titles.append(tag("th", tag("span", side, class_="scale"), scope="col", class_="bar"))
    parts = join((tag("thead", tag("tr", join(titles))), tag("tbody", join(lines))))
    unit = "nats per token (log-perplexity)" if loss else "points of accuracy"
    about = f"On held-out data. Bars: how far each lies from the untuned full model, in {unit}."
    style = "rows" if len(names) == 2 else "rows one"
    card = tag("div", tag("table", parts, class_=style), class_="card")
    return tag("section", join((tag("h2", "The five rows"), tag("p", about, class_="about"), card)))


def _numbers(row: Row | None, loss: bool, f1: bool) -> list[str]:
    """What stands beside a row's name: perplexity and loss, or accuracy and, where rows have one, F1."""
    if row is None:
        return ["not run", *([""] if loss or f1 else [])]
    if loss:
        return [show(row), f"{row.value:.3f}" if math.isfinite(row.value) else "-"]
    return [show(row), *(["-" if row.f1 is None else f"{row.f1:.1%}"] if f1 else [])]


def _bar(gain: float, zero: float, scale: float, color: str, loss: bool) -> Markup:
    """A bar from the line of the untuned model to the right (better) or to the left (worse), with its number."""
    at = f"--at:{zero:.2f}%"
    if not math.isfinite(gain):
        return tag("span", tag("span", "diverged", style=f"left:{zero:.2f}%"), class_="track", style=at)
    length, text = abs(gain) * scale, f"{gain:+.2f}" if loss else f"{100 * gain:+.1f}"
    if color == "zero":
        return tag("span", class_="track", style=at)
    left = zero if gain >= 0 else zero - length
    bar = tag("i", style=f"left:{left:.2f}%;width:{length:.2f}%;background:var(--{color})")
    side, end = ("right", left + length) if gain >= 0 else ("left", left)
    number = tag("span", text.replace("-", "\N{MINUS SIGN}"), class_=side, style=f"left:{end:.2f}%")
    return tag("span", join((bar, number)), class_="track", style=at)
