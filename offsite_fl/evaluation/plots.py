"""The plots of the page, as SVG to put inside HTML.

No text of a user ever gets into a plot: names stand in HTML legends, where escaping is simple and where matplotlib
doesn't read a ``$`` as mathematics. Colours leave here as CSS variables, so that one plot serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.ledger import DIRECTIONS, KINDS, Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.evaluation.rows import FiveRows, Row, significant
from offsite_fl.sizes import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
# Each colour once: the value is what a renderer without CSS variables shows, the key is the variable of the page.
COLORS = {
    "plug": "#0f766e",
    "emulator": "#b45309",
    "zero": "#7d828b",
    "full": "#4f46e5",
    "ink": "#1f2328",
    "muted": "#6b7078",
    "grid": "#e4e2dc",
    "card": "#fffffe",
    "bundle": "#b45310",
    "patch": "#a16207",
    "adapter": "#0f766f",
    "update": "#4f46e6",
    "metrics": "#94a3b8",
    **{f"c{i}": c for i, c in enumerate(SERIES)},
}
MANY = len(SERIES)  # beyond so many clients single curves can't be told apart by colour
STROKES: dict[str, Literal["dashed", "dotted"]] = {"zero": "dashed", "full": "dotted"}
DASHES = {"zero": (0, (5, 3)), "full": (0, (1, 1.6))}
SIZE = (5.0, 2.75)  # inches; 72 units of the SVG each, shown about 1:1 so that 10 units of text stay legible


@dataclass(frozen=True)
class Mark:
    """One entry of a plot's legend: its text (unescaped), the CSS variable of its colour, and how it is drawn."""

    label: str
    color: str
    shape: Literal["line", "dashed", "dotted", "box"] = "line"


@dataclass(frozen=True)
class Plot:
    """An inline SVG and the legend that belongs to it."""

    svg: str
    legend: tuple[Mark, ...]


def require_matplotlib() -> None:
    """Raise ``ConfigError`` if the extra is missing; call it before a long run that is to end with a page."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "report.html needs matplotlib, which comes with the extra 'report': pip install 'offsite-fl[report]'"
        ) from error


def row_curve(rounds: Sequence[RoundRecord], rows: FiveRows, which: Literal["plug_in", "emulator"]) -> Plot | None:
    """The plug-in's or the emulator's row by round, with lines for the rows to compare it with."""
    points = [(r.round, row) for r in rounds if (row := getattr(r, which)) is not None and _drawable(row)]
    if not points:
        return None
    color, label = ("plug", "plug-in") if which == "plug_in" else ("emulator", "emulator with the tuned adapter")
    lines = [("full zero-shot", "zero", rows.full_zero_shot)]
    if which == "plug_in" and rows.full_fine_tuning is not None:
        lines.append(("full fine-tuning", "full", rows.full_fine_tuning))
    lines = [line for line in lines if _drawable(line[2])]
    with drawing(which) as (axes, finish):
        for _, name, row in lines:
            axes.axhline(row.value, color=COLORS[name], linewidth=1.5, linestyle=DASHES[name], zorder=1)
        _line(axes, [n for n, _ in points], [row.value for _, row in points], color)
        _mark_skipped(axes, rounds)
        _round_axis(axes, [n for n, _ in points])
        _value_axis(axes, rows.measure)
        svg = finish()
    return Plot(svg, (Mark(label, color), *(Mark(name, c, STROKES[c]) for name, c, _ in lines)))


def client_curves(
    rounds: Sequence[RoundRecord], metric: str = "train_loss", unit: str = "nats per token"
) -> Plot | None:
    """What each client reported by round, in ``unit``; many clients become thin lines around their median."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in rounds:
        for name, metrics in entry.clients.items():
            if math.isfinite(value := metrics.get(metric, math.nan)):
                curves.setdefault(name, []).append((entry.round, value))
    if not curves:
        return None
    many = len(curves) > MANY
    legend: list[Mark] = []
    with drawing("clients") as (axes, finish):
        for i, (name, points) in enumerate(curves.items()):
            numbers, values = [n for n, _ in points], [v for _, v in points]
            if many:
                axes.plot(numbers, values, color=COLORS["metrics"], linewidth=0.7, alpha=0.6)
            else:
                _line(axes, numbers, values, f"c{i}")
                legend.append(Mark(name, f"c{i}"))
        by_round = _by_round(curves)
        if many:
            _line(axes, list(by_round), [median(values) for values in by_round.values()], "ink")
            legend = [Mark("median", "ink"), Mark(f"each of {len(curves)} clients", "metrics")]
        _mark_skipped(axes, rounds)
        _round_axis(axes, list(by_round))
        axes.set_ylabel(f"training loss, {unit}", color=COLORS["muted"])
        svg = finish()
    return Plot(svg, tuple(legend))


def bytes_by_round(ledger: Ledger) -> Plot | None:
    """Bytes by round and kind in stacked bars: to the data owners above the line, back to the model owner below."""
    sums = ledger.totals("round", "direction", "kind")
    if not any(sums.values()):
        return None
    numbers = sorted({key[0] for key in sums})
    seen: list[str] = []
    with drawing("bytes") as (axes, finish):
        for direction in DIRECTIONS:
            sign, base = (1 if direction == "down" else -1), [0.0] * len(numbers)
            for kind in KINDS:
                heights = [float(sign * sums.get((n, direction, kind), 0)) for n in numbers]
                if not any(heights):
                    continue
                axes.bar(numbers, heights, 0.62, bottom=base, color=COLORS[kind], zorder=2)
                base = [b + h for b, h in zip(base, heights, strict=True)]
                seen.append(kind)
        axes.axhline(0, color=COLORS["muted"], linewidth=0.8, zorder=3)
        axes.spines["bottom"].set_visible(False)
        _round_axis(axes, numbers)
        axes.yaxis.set_major_formatter(lambda value, _: human_bytes(abs(value)))
        svg = finish()
    return Plot(svg, tuple(Mark(kind, kind, "box") for kind in KINDS if kind in seen))


def _by_round(curves: Mapping[str, list[tuple[int, float]]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for points in curves.values():
        for number, value in points:
            found.setdefault(number, []).append(value)
    return dict(sorted(found.items()))


def _drawable(row: Row) -> bool:
    return math.isfinite(row.value)


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], color: str) -> None:
    dots = "o" if len(x) <= 30 else ""
    axes.plot(x, y, color=COLORS[color], linewidth=1.8, marker=dots, markersize=4.5, zorder=3, solid_capstyle="round")


def _mark_skipped(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    for entry in rounds:
        if entry.skipped:
            axes.axvspan(entry.round - 0.4, entry.round + 0.4, color=COLORS["grid"], alpha=0.6, linewidth=0, zorder=0)


def _round_axis(axes: Axes, numbers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round", color=COLORS["muted"])


def _value_axis(axes: Axes, measure: str) -> None:
    """Nats on the left and the same heights as perplexity on the right; or accuracy in per cent."""
    axes.margins(y=0.12)
    if measure == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        axes.set_ylabel("accuracy", color=COLORS["muted"])
        return
    axes.set_ylabel("nats per token", color=COLORS["muted"])
    other = axes.twinx()
    other.set_ylim(axes.get_ylim())
    other.yaxis.set_major_formatter(lambda value, _: significant(math.exp(min(value, 700.0))))
    other.set_ylabel("perplexity", color=COLORS["muted"], rotation=-90, va="bottom")
    other.tick_params(length=0, colors=COLORS["muted"])
    other.set_frame_on(False)


@contextmanager
def drawing(name: str, size: tuple[float, float] = SIZE) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Empty axes in the style of the page, and the function that turns them into SVG once they are drawn on.

    ``name`` goes in front of the picture's ids and must be unique on a page; ``size`` is in inches.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # hashsalt: ids that are the same from run to run, so that two pages can be compared with diff.
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.usetex": False}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc is meant for other plots
        for key, value in settings.items():
            matplotlib.rcParams[key] = value
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=COLORS["grid"], linewidth=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(COLORS["muted"])
        axes.tick_params(length=0, colors=COLORS["muted"])

        def finish() -> str:
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            return inline(out.getvalue(), name)

        yield axes, finish


def inline(svg: str, name: str) -> str:
    """What matplotlib writes as a file, made fit for standing inside a page beside other such pictures.

    Dropped are the XML head, metadata, style rules that would reach beyond the picture, and ids that nothing refers
    to; the others get ``name`` in front. Colours become CSS variables, fonts the page's, the size that of the card.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{name}-\g<2>", svg)
    variables = {value: f"var(--{key},{value})" for key, value in COLORS.items()}
    svg = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda m: variables.get(m[0], m[0]), svg)
    svg = re.sub(r"; font-family: [^;\"]+", "", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    head = f'<svg {box[0] if box else ""} class="plot" aria-hidden="true">'
    svg = re.sub(r"<svg[^>]*>", head, svg, count=1)
    return re.sub(r"\s*\n\s*", " ", svg).strip()
