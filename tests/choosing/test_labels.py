"""Numbers of a crowded plot stand apart, near their points, inside the frame."""

from __future__ import annotations

import itertools
import math
import random

from offsite_fl.choosing.labels import HALF_HEIGHT, HALF_WIDTH, Point, place_labels

FRAME = (600.0, 280.0)


def spots(points: list[Point], radius: float = 4.0, bars: bool = False) -> list[Point]:
    offsets = place_labels(points, [radius] * len(points), *FRAME, bars)
    return [(x + dx, y + dy) for (x, y), (dx, dy) in zip(points, offsets, strict=True)]


def overlap(a: Point, b: Point) -> bool:
    return abs(a[0] - b[0]) < 2 * HALF_WIDTH - 1 and abs(a[1] - b[1]) < 2 * HALF_HEIGHT - 1


def test_scattered_points() -> None:
    generator = random.Random(0)
    points = [(generator.uniform(10, 590), generator.uniform(10, 270)) for _ in range(22)]
    found = spots(points)
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))
    assert all(math.dist(point, spot) < 45 for point, spot in zip(points, found, strict=True))


def test_points_on_one_another() -> None:
    found = spots([(300.0, 140.0)] * 5)
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))


def test_corners() -> None:
    for x, y in spots([(0.0, 0.0), (600.0, 0.0), (0.0, 280.0), (600.0, 280.0)]):
        assert HALF_WIDTH <= x <= 600 - HALF_WIDTH and HALF_HEIGHT <= y <= 280 - HALF_HEIGHT


def test_beside_the_lines_of_deviations() -> None:
    ((x, y),) = spots([(300.0, 140.0)], bars=True)
    assert abs(x - 300) >= HALF_WIDTH and abs(y - 140) >= HALF_HEIGHT
