"""The plot of the choice: what each candidate gains against how far it keeps the model protected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.labels import place_labels
from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.choosing.standing import Standing, Verdict
from offsite_fl.choosing.yardstick import ACCURACY, Yardstick
from offsite_fl.evaluation.plots import COLORS, DASHES, STROKES, Mark, Plot, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 9.6, 4.6  # inches
# What axis labels and ticks leave of the picture, in typographic points; near enough to place numbers by.
_INNER = (72 * WIDTH - 70.0, 72 * HEIGHT - 52.0)
VERDICTS: dict[Verdict, tuple[str, str]] = {
    "protects": ("protects", "plug"),
    "gives the model away": ("tuned emulator better than the untuned model", "emulator"),
    "gap not clear": ("tuned emulator not clearly worse than the plug-in", "c7"),
    "worse than the full model": ("worse than the full model on public data", "plug"),
    "as good as the full model": ("as good as the full model on public data", "c7"),
    "over budget": ("over budget", "zero"),
}
_SMALL, _LARGE = 34.0, 190.0  # area of a dot in square points


@dataclass(frozen=True)
class Dot:
    """One candidate in the plot; ``x`` and ``y`` in the units of the axes, deviations None for one seed."""

    number: int
    standing: Standing
    x: OverSeeds
    y: OverSeeds


@dataclass(frozen=True)
class View:
    """What the plot is in: the number, how it bends ``across`` and ``up``, and whether up are ``shares`` of a gain."""

    by: Yardstick
    across: Scale
    up: Scale
    shares: bool


@dataclass(frozen=True)
class Scale:
    """How an axis bends, so that small and large numbers can be told apart, and where it may have ticks."""

    bend: Callable[[float], float]
    ticks: tuple[float, ...]
    text: Callable[[float], str]


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _share(value: float) -> float:
    """Gains as they are, losses (which have no end) squeezed."""
    return value if value >= 0 else -0.3 * math.log1p(-value)


NATS = Scale(
    _root,
    (-4, -2, -1, -0.5, -0.25, -0.1, -0.02, 0, 0.02, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16),
    lambda v: f"{v:g}".replace("-", "\N{MINUS SIGN}"),
)
SHARES = Scale(
    _share,
    (-100, -30, -10, -3, -1, 0, 0.25, 0.5, 0.75, 1, 1.5, 2),
    lambda v: f"{100 * v:g}%".replace("-", "\N{MINUS SIGN}"),
)
POINTS = Scale(
    _root,
    (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    lambda v: f"{100 * v:g}".replace("-", "\N{MINUS SIGN}"),
)
COSINES = Scale(lambda v: v, (-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 0.9, 1), lambda v: NATS.text(v))


def frontier(choice: Choice, yardstick: Yardstick | None = None) -> Plot | None:
    """Gain over protection, a numbered dot for each candidate; None where there is nothing to draw.

    In one of the kind's yardsticks; None takes the one that candidates are judged in.
    """
    by = yardstick or choice.settings.kind.judged_in
    dots = _dots(choice, by)
    if not dots:
        return None
    shares = choice.tuned and dots[0].standing.figures(by).of_adapter is not None
    steps = POINTS if choice.tuned and by is ACCURACY else NATS
    view = View(by, steps, (SHARES if shares else steps) if choice.tuned else COSINES, shares)
    with drawing(f"frontier-{by.name}", (WIDTH, HEIGHT)) as (axes, finish):
        levels = _levels(choice, view)
        _frame(axes, [d.x for d in dots], [d.y for d in dots], view, [value for _, _, value in levels])
        axes.axvline(0.0, color=COLORS["muted"], linewidth=0.9, zorder=1)
        for _, color, value in levels:
            style = DASHES.get(color, "-")
            axes.axhline(view.up.bend(value), linewidth=1.3, zorder=1, color=COLORS[color], linestyle=style)
        _front(axes, dots, view)
        _draw(axes, dots, choice, view)
        axes.set_xlabel(_across(choice, view), color=COLORS["muted"])
        axes.set_ylabel(_upwards(choice, view), color=COLORS["muted"])
        svg = finish()
    return Plot(svg, _legend(choice, dots, levels))


def _dots(choice: Choice, by: Yardstick) -> list[Dot]:
    dots = []
    for number, standing in enumerate(choice.standings, start=1):
        x, y = (
            (standing.figures(by).gap, _gain(choice, standing, by))
            if choice.tuned
            else (standing.public_margin, standing.cosine)
        )
        if standing.verdict != "failed" and x and y and math.isfinite(x.mean) and math.isfinite(y.mean):
            dots.append(Dot(number, standing, x, y))
    return dots


def _gain(choice: Choice, standing: Standing, by: Yardstick) -> OverSeeds | None:
    """As a share of what the adapter can gain or, where that is nothing, as it is."""
    found, zero = standing.figures(by), choice.references(by).zero_shot
    if found.of_adapter is not None or found.plug_in is None or zero is None:
        return found.of_adapter
    return OverSeeds.of(by.behind(zero, value) for value in found.plug_in.values)


def _levels(choice: Choice, view: View) -> list[tuple[str, str, float]]:
    """Lines across the plot to compare with: name, colour, height."""
    if not choice.tuned:
        return [("the full model's own gradient", "full", 1.0)]
    levels, found = [("untuned full model", "zero", 0.0)], choice.references(view.by)
    zero, best, full = found.zero_shot, found.uncompressed, found.full_fine_tuning
    if not view.shares or zero is None or best is None:
        return levels
    levels.append(("the same adapter on the uncompressed model", "ink", 1.0))
    if full is not None and view.by.behind(zero, full.mean) > 0:
        levels.append(("full fine-tuning", "full", (zero - full.mean) / (zero - best.mean)))
    return levels


def _frame(axes: Axes, x: Sequence[OverSeeds], y: Sequence[OverSeeds], view: View, levels: Sequence[float]) -> None:
    """Limits around all points, and ticks that don't crowd each other."""
    for scale, several, extra, room, inner, set_limits, set_ticks in (
        (view.across, x, [0.0], 34.0, _INNER[0], axes.set_xlim, axes.set_xticks),
        (view.up, y, list(levels), 15.0, _INNER[1], axes.set_ylim, axes.set_yticks),
    ):
        # By the means: the deviations of a candidate that hangs on its seed would push all others into a corner.
        ends = [s.mean for s in several] + extra
        low, high = scale.bend(min(ends)), scale.bend(max(ends))
        pad = 0.07 * ((high - low) or 1.0)
        low, high = low - pad, high + pad
        set_limits(low, high)
        ticks = _apart([t for t in scale.ticks if low <= scale.bend(t) <= high], scale, room * (high - low) / inner)
        set_ticks([scale.bend(t) for t in ticks], [scale.text(t) for t in ticks])
    axes.grid(axis="x", color=COLORS["grid"], linewidth=0.8)


def _apart(ticks: Sequence[float], scale: Scale, least: float) -> list[float]:
    """Those of ``ticks`` that are ``least`` apart; 0 and 1 go first."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda t: (t not in (0, 1), abs(t))):
        if all(abs(scale.bend(tick) - scale.bend(other)) >= least for other in kept):
            kept.append(tick)
    return sorted(kept)


def _ends(given: OverSeeds) -> tuple[float, float]:
    """One standard deviation to both sides."""
    reach = given.std or 0.0
    return given.mean - reach, given.mean + reach


def _front(axes: Axes, dots: Sequence[Dot], view: View) -> None:
    """A line through the candidates within the budget that gain and that no other one beats in both directions."""
    fitting = [d for d in dots if d.standing.verdict != "over budget" and d.y.mean > 0]
    best = [d for d in fitting if not any(_beats(other, d) for other in fitting)]
    points = sorted((view.across.bend(d.x.mean), view.up.bend(d.y.mean)) for d in best)
    axes.plot([p[0] for p in points], [p[1] for p in points], color=COLORS["grid"], linewidth=5, zorder=1.5)


def _beats(one: Dot, other: Dot) -> bool:
    no_worse = one.x.mean >= other.x.mean and one.y.mean >= other.y.mean
    return no_worse and (one.x.mean > other.x.mean or one.y.mean > other.y.mean)


def _draw(axes: Axes, dots: Sequence[Dot], choice: Choice, view: View) -> None:
    areas = _areas(dots)
    for dot, area in zip(dots, areas, strict=True):
        x, y = view.across.bend(dot.x.mean), view.up.bend(dot.y.mean)
        color = COLORS[VERDICTS[dot.standing.verdict][1]]
        for ends, fixed, horizontal in ((_ends(dot.x), y, True), (_ends(dot.y), x, False)):
            if ends[0] == ends[1]:
                continue
            line = [(view.across if horizontal else view.up).bend(end) for end in ends]
            pair = (line, [fixed, fixed]) if horizontal else ([fixed, fixed], line)
            axes.plot(*pair, color=color, linewidth=1.0, alpha=0.7, zorder=2.5)
        hollow = dot.standing.verdict == "over budget"
        fill, edge = (COLORS["card"], color) if hollow else (color, COLORS["card"])
        axes.scatter([x], [y], s=area, facecolor=fill, edgecolor=edge, linewidth=1.2, alpha=0.9, zorder=3)
        if dot.standing is choice.best:
            axes.scatter([x], [y], s=area + 130, facecolor="none", edgecolor=COLORS["ink"], linewidth=1.5, zorder=4)
    _number(axes, dots, areas, choice, view)


def _areas(dots: Sequence[Dot]) -> list[float]:
    shares = [dot.standing.verbatim_share or 0.0 for dot in dots]
    low, high = min(shares), max(shares)
    return [_SMALL + (_LARGE - _SMALL) * ((s - low) / (high - low) if high > low else 0.3) for s in shares]


def _number(axes: Axes, dots: Sequence[Dot], areas: Sequence[float], choice: Choice, view: View) -> None:
    """The candidate's number beside each dot."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = _INNER
    bent = [(view.across.bend(d.x.mean), view.up.bend(d.y.mean)) for d in dots]
    points = [((x - left) / (right - left) * width, (y - bottom) / (top - bottom) * height) for x, y in bent]
    ring = [130.0 if d.standing is choice.best else 0.0 for d in dots]
    radii = [math.sqrt((area + more) / math.pi) for area, more in zip(areas, ring, strict=True)]
    bars = len(choice.settings.seeds) > 1
    for dot, place, offset in zip(dots, bent, place_labels(points, radii, width, height, bars), strict=True):
        axes.annotate(
            str(dot.number),
            place,
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            color=COLORS["ink"],
            fontweight="bold" if dot.standing is choice.best else "normal",
            zorder=5,
        )


def _across(choice: Choice, view: View) -> str:
    kind, by = choice.settings.kind, view.by
    if not choice.tuned:
        return f"emulator's loss over the full model's on {kind.public}, {kind.loss.unit} (more: gives away less)"
    if by is ACCURACY:
        return "gap: plug-in's accuracy over the tuned emulator's, percentage points (more: better protected)"
    return f"gap: tuned emulator's loss over the plug-in's, {by.unit} (more: better protected)"


def _upwards(choice: Choice, view: View) -> str:
    if not choice.tuned:
        return "cosine of the adapter's gradients"
    return "plug-in's share of the adapter's gain" if view.shares else f"plug-in's gain, {view.by.step_unit}"


def _legend(choice: Choice, dots: Sequence[Dot], levels: Sequence[tuple[str, str, float]]) -> tuple[Mark, ...]:
    seen = {dot.standing.verdict for dot in dots}
    marks = [Mark(text, color, "box") for verdict, (text, color) in VERDICTS.items() if verdict in seen]
    if any(dot.standing is choice.best for dot in dots):
        marks.append(Mark("ringed: the one to take", "ink", "box"))
    marks += [Mark(name, color, STROKES.get(color, "line")) for name, color, _ in levels]
    return (*marks, Mark("not beaten in both directions", "grid"))
