"""The pictures of the page: the plug-in by round, by bytes and by client time, and who holds what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from offsite_fl.comparing.results import Point
from offsite_fl.comparing.summary import Standing, Summary
from offsite_fl.evaluation.plots import COLORS, DASHES, MANY, Mark, Plot, drawing
from offsite_fl.evaluation.rows import significant
from offsite_fl.sizes import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Against = Literal["round", "bytes", "client time"]
AGAINST: dict[Against, Callable[[Point], float]] = {
    "round": lambda point: float(point.round),
    "bytes": lambda point: float(point.bytes),
    "client time": lambda point: point.client_seconds,
}
_SIZE = (3.5, 2.7)  # inches; three stand side by side


def curve(summary: Summary, standings: Sequence[Standing], against: Against, name: str) -> Plot | None:
    """Mean over seeds of the plug-in's loss, a line for each of the best strategies; None where there is nothing.

    ``name`` goes before the picture's ids. At most eight lines, for more can't be told apart by colour.
    """
    shown = [s for s in standings if s.arm.role == "strategy" and _means(s, against)][:MANY]
    if not shown:
        return None
    several = len(summary.settings.grid.emulators) > 1
    legend = []
    with drawing(name, _SIZE) as (axes, finish):
        for color, standing in zip((f"c{i}" for i in range(MANY)), _by_name(shown), strict=False):
            points = _means(standing, against)
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, y, color=COLORS[color], linewidth=1.8, marker="o", markersize=3.5, zorder=3)
            label = f"{standing.arm.label}, {standing.arm.emulator}" if several else standing.arm.label
            legend.append(Mark(label, color))
        legend += _levels(axes, summary, standings)
        _dress(axes, against)
        svg = finish()
    return Plot(svg, tuple(legend))


def _by_name(standings: Sequence[Standing]) -> list[Standing]:
    """The same colour for the same strategy in every picture of a condition, whatever its rank."""
    return sorted(standings, key=lambda standing: (standing.arm.strategy, standing.arm.emulator))


def _means(standing: Standing, against: Against) -> list[tuple[float, float]]:
    """Point by point, over the seeds that have all of them."""
    several = [found.points() for found in standing.measured]
    length = max(map(len, several), default=0)
    whole = [points for points in several if len(points) == length]
    means = []
    for same in zip(*whole, strict=True):
        x = math.fsum(AGAINST[against](point) for point in same) / len(same)
        y = math.fsum(point.plug_in for point in same) / len(same)
        if math.isfinite(y):
            means.append((x, y))
    return means


def _levels(axes: Axes, summary: Summary, standings: Sequence[Standing]) -> list[Mark]:
    """Lines across for the untuned model and for full fine-tuning."""
    marks = []
    full = next((s.plug_in.mean for s in standings if s.arm.role == "full-fine-tuning" and s.plug_in), None)
    for label, color, value, dash in (
        ("untuned full model", "zero", summary.zero_shot, "dashed"),
        ("full fine-tuning", "full", full, "dotted"),
    ):
        if value is not None and math.isfinite(value):
            axes.axhline(value, color=COLORS[color], linewidth=1.4, linestyle=DASHES[color], zorder=1)
            marks.append(Mark(label, color, dash))  # type: ignore[arg-type]
    return marks


def _dress(axes: Axes, against: Against) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.margins(y=0.1)
    axes.set_ylabel("nats per token", color=COLORS["muted"])
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=3 if against == "bytes" else 5, integer=against == "round", min_n_ticks=2)
    )
    if against == "bytes":
        axes.xaxis.set_major_formatter(lambda value, _: human_bytes(max(round(value), 0)))
    labels = {"round": "round", "bytes": "both ways, all clients", "client time": "seconds of all clients"}
    axes.set_xlabel(labels[against], color=COLORS["muted"])


def holdings(characters: Mapping[str, Mapping[str, int]], owners: Sequence[str], name: str) -> Plot:
    """A bar for each client, as long as its text, in the colours of the domains that it is from."""
    clients = list(characters)
    height = 0.7 + 0.3 * min(len(clients), 24)
    with drawing(name, (5.0, height)) as (axes, finish):
        left = [0.0] * len(clients)
        legend = []
        for number, owner in enumerate(owners):
            widths = [float(characters[client].get(owner, 0)) for client in clients]
            color = f"c{number % MANY}"
            axes.barh(range(len(clients)), widths, left=left, color=COLORS[color], height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
            legend.append(Mark(owner, color, "box"))
        axes.set_yticks(range(len(clients)), [str(number) for number in range(len(clients))])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_ylabel("client", color=COLORS["muted"])
        axes.set_xlabel("characters", color=COLORS["muted"])
        axes.xaxis.set_major_formatter(lambda value, _: significant(value / 1000) + "k" if value else "0")
        svg = finish()
    return Plot(svg, tuple(legend))
