"""The sign-flip test by hand and against a slow version."""

from __future__ import annotations

import itertools

import pytest

from offsite_fl.comparing.statistics import Paired, sign_flip


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0], 1.0),  # both signs lie as far
        ([1.0, 1.0, 1.0], 2 / 8),
        ([1.0, 1.0, -1.0], 1.0),  # |sum| = 1, and no way to set three ones has a smaller one
        ([3.0, 2.0, 1.0], 2 / 8),
        ([3.0, 2.0, -1.0], 4 / 8),  # sums at least 4: +++, ++- and their mirrors
        ([0.0, 0.0], 1.0),
        ([0.1] * 9, 2 / 512),
    ],
)
def test_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip(differences) == p


def test_order_sign_and_scale_change_nothing() -> None:
    values = [0.31, -0.02, 0.17, 0.05, -0.11]
    p = sign_flip(values)
    assert sign_flip([-v for v in values]) == p == sign_flip(sorted(values)) == sign_flip([1000 * v for v in values])


def test_against_a_slow_version() -> None:
    values = [0.3, -0.1, 0.25, 0.05, 0.4, -0.2, 0.15]
    sums = [
        abs(sum(s * abs(v) for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=7)
    ]
    assert sign_flip(values) == sum(total >= abs(sum(values)) - 1e-9 for total in sums) / len(sums)


def test_many_pairs_are_drawn_and_stay_near_the_exact_share() -> None:
    assert sign_flip([1.0] * 20) < 1e-4
    balanced = [1.0, -1.0] * 10
    assert sign_flip(balanced) == 1.0


def test_paired() -> None:
    paired = Paired((0.1, 0.3, -0.1))
    assert paired.mean == pytest.approx(0.1) and paired.wins == 2 and paired.p == sign_flip([0.1, 0.3, -0.1])
