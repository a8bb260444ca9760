"""The few pieces of HTML that the page is made of. Whatever is passed in as text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from offsite_fl.evaluation.plots import Plot

_VOID = ("img",)  # elements without content and without an end


class Markup(str):
    """Text that is HTML already; everything else is escaped by :func:`safe`."""

    __slots__ = ()


def safe(value: object) -> Markup:
    """``value`` as HTML text, escaped unless it is :class:`Markup`."""
    return value if isinstance(value, Markup) else Markup(escape(plain(value), quote=True))


def plain(value: object) -> str:
    """A setting or number as a reader wants it: no float noise, ``-`` for nothing, lists with commas."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value) or "-"
    return str(value)


def count(number: int, one: str, several: str = "") -> str:
    """``1 round``, ``2 rounds``; nothing for none."""
    return f"{number} {one if number == 1 else several or one + 's'}" if number else ""


def duration(seconds: float) -> str:
    """A span of time in words.

    >>> duration(0.42), duration(75), duration(7300)
    ('0.42 s', '1 min 15 s', '2 h 1 min')
    """
    if not 59.5 <= seconds < float("inf"):
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def join(parts: Iterable[Markup]) -> Markup:
    """Pieces of HTML one after the other."""
    return Markup("\n".join(part for part in parts if part))


def tag(name: str, content: object = "", **attributes: object) -> Markup:
    """One element; ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``.

    >>> tag("p", "a < b", class_="about")
    '<p class="about">a &lt; b</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{safe(content) if content != '' else ''}</{name}>")


def table(
    head: Sequence[str],
    body: Iterable[Sequence[object]],
    foot: Sequence[object] = (),
    text_columns: Sequence[int] = (0,),
) -> Markup:
    """A table that scrolls by itself where it is too wide; columns hold right-aligned numbers unless named as text."""

    def line(cells: Sequence[object], scope: str) -> Markup:
        done = []
        for i, cell in enumerate(cells):
            style = "n" if i not in text_columns else "free" if i else None
            is_head = scope == "col" or i == 0
            done.append(tag("th" if is_head else "td", cell, class_=style, scope=scope if is_head else None))
        return tag("tr", join(done))

    parts = [tag("thead", line(head, "col")), tag("tbody", join(line(cells, "row") for cells in body))]
    if foot:
        parts.append(tag("tfoot", line(foot, "row")))
    return tag("div", tag("table", join(parts)), class_="scroll")


def definitions(entries: Mapping[str, object]) -> Markup:
    """Names and values below each other."""
    pairs = (tag("div", join((tag("dt", key), tag("dd", value)))) for key, value in entries.items())
    return tag("dl", join(pairs), class_="list")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def meters(values: Mapping[str, float], shown: Mapping[str, str], most: float | None = None) -> Markup:
    """Names, numbers and a bar each, as long as its share of ``most`` (None: of the largest)."""
    finite = {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}
    most = most or max(finite.values(), default=0) or 1
    rows = []
    for name in values:
        bar = tag("span", tag("i", style=f"width:{100 * min(max(finite[name] / most, 0), 1):.2f}%"), class_="meter")
        rows.append(tag("tr", join((tag("th", name, scope="row"), tag("td", shown[name], class_="n"), tag("td", bar)))))
    return tag("table", tag("tbody", join(rows)))


def figure(title: str, about: str, plot: Plot | None) -> Markup:
    """A card with a plot and its legend; nothing where there is no plot."""
    if plot is None:
        return Markup()
    marks = []
    for mark in plot.legend:
        paint = "background" if mark.shape == "box" else "border-color"
        swatch = tag("i", class_=mark.shape, style=f"{paint}:var(--{mark.color})")
        marks.append(tag("li", join((swatch, tag("span", mark.label)))))
    picture = tag("div", Markup(plot.svg), role="img", aria_label=f"{title}. {about}")
    legend = tag("ul", join(marks), class_="legend")
    return tag("figure", join((tag("h3", title), tag("p", about, class_="about"), picture, legend)), class_="card")


def section(title: str, about: str, *content: Markup) -> Markup:
    """A part of the page under its heading."""
    return tag("section", join((tag("h2", title), tag("p", about, class_="about") if about else Markup(), *content)))


def kicker(facts: Iterable[object]) -> Markup:
    """The line above the head of a page: the project's name and ``facts``; those that are empty are left out."""
    told = "".join(f" · {plain(fact)}" for fact in facts if fact)
    return tag("p", join((tag("b", "offsite_fl"), safe(told))), class_="kicker")


def tiles(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """Names side by side, each with its value in large letters and what there is to say about it."""
    cells = (
        tag("div", join((tag("dt", name), tag("dd", join((tag("b", value), safe(about)))))))
        for name, value, about in entries
    )
    return tag("dl", join(cells), class_="tiles", style=f"--n:{len(entries)}")


def stacked(text: str) -> Markup:
    """A mean with its deviation below, so that many columns fit.

    >>> print(stacked("3.553 ± 0.004"))
    3.553
    <span class="note">± 0.004</span>
    """
    mean, _, deviation = text.partition(" ± ")
    return join((safe(mean), tag("span", f"± {deviation}", class_="note") if deviation else Markup()))
