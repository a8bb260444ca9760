"""Where the numbers of a crowded plot go: beside their points, and not over each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]
# Half of a number's width and height in points, for up to two digits at the plot's size of text.
HALF_WIDTH, HALF_HEIGHT = 8.0, 5.5
_RINGS = (0.0, 6.0, 12.0, 20.0, 30.0)
_SIDES = 12


def place_labels(
    points: Sequence[Point], radii: Sequence[float], width: float, height: float, bars: bool = False
) -> list[Point]:
    """For each point, inside a frame of ``width`` x ``height``, the offset of its label; all in typographic points.

    Each label takes the nearest place of those around its point that overlaps least with all points, with the labels
    before it and with the frame; with ``bars`` also with the lines that go through its point up, down and sideways.
    """
    placed: list[Point] = []
    offsets: list[Point] = []
    for index, (x, y) in enumerate(points):
        best: tuple[float, Point] | None = None
        for dx, dy in _places(radii[index]):
            spot = (x + dx, y + dy)
            cost = _overlap(spot, points, radii, placed) + _outside(spot, width, height) + 0.02 * math.hypot(dx, dy)
            cost += 1.0 if bars and (abs(dx) < HALF_WIDTH or abs(dy) < HALF_HEIGHT) else 0.0
            if best is None or cost < best[0] - 1e-9:
                best = (cost, (dx, dy))
        assert best is not None
        offsets.append(best[1])
        placed.append((x + best[1][0], y + best[1][1]))
    return offsets


def _places(radius: float) -> list[Point]:
    """Around a point, nearest first, beginning on the right."""
    places = []
    for ring in _RINGS:
        for side in range(_SIDES):
            angle = 2 * math.pi * side / _SIDES
            reach = radius + ring + 2.0
            dx = math.cos(angle) * (reach + HALF_WIDTH)
            places.append((dx, math.sin(angle) * (reach + HALF_HEIGHT)))
    return places


def _overlap(spot: Point, points: Sequence[Point], radii: Sequence[float], placed: Sequence[Point]) -> float:
    """How many points and labels a label at ``spot`` covers, each in part."""
    covered = 0.0
    for (x, y), radius in zip(points, radii, strict=True):
        covered += _share(spot, (x, y), HALF_WIDTH + radius, HALF_HEIGHT + radius)
    return covered + sum(_share(spot, other, 2 * HALF_WIDTH, 2 * HALF_HEIGHT) for other in placed)


def _share(a: Point, b: Point, across: float, down: float) -> float:
    return max(0.0, 1 - abs(a[0] - b[0]) / across) * max(0.0, 1 - abs(a[1] - b[1]) / down) * 4


def _outside(spot: Point, width: float, height: float) -> float:
    x, y = spot
    inside = HALF_WIDTH <= x <= width - HALF_WIDTH and HALF_HEIGHT <= y <= height - HALF_HEIGHT
    return 0.0 if inside else 5.0
