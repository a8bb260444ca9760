"""Spending a budget of bytes: by hand, and against the rule played out slowly."""

from __future__ import annotations

import random

import pytest

from offsite_fl.emulators.bit_choice import Stage, spend

Ways = list[Stage[int]]


def ways(*stages: tuple[int, int, float]) -> Ways:
    return [Stage(choice, size, error) for choice, size, error in stages]


ONE = ways((4, 10, 0.08), (8, 20, 0.01), (16, 40, 0.0))
TWO = ways((4, 10, 0.05), (8, 20, 0.01), (16, 40, 0.0))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, (4, 4)),  # nothing is below the first stage
        (29, (4, 4)),
        (30, (8, 4)),  # 0.07 less error for ten bytes against 0.04
        (40, (8, 8)),
        (59, (8, 8)),
        (60, (16, 8)),  # equal gains: the first
        (80, (16, 16)),
        (1000, (16, 16)),
    ],
)
def test_by_hand(budget: int, expected: tuple[int, int]) -> None:
    assert spend({"one": ONE, "two": TWO}, budget) == dict(zip(("one", "two"), expected, strict=True))


def test_an_error_counts_for_each_byte() -> None:
    """0.1 less for 50 bytes is less than 0.05 less for 10."""
    large, small = ways((4, 50, 0.11), (8, 100, 0.01)), ways((4, 10, 0.06), (8, 20, 0.01))
    assert spend({"large": large, "small": small}, 110) == {"large": 4, "small": 8}


def test_what_does_not_fit_lets_others_go_on() -> None:
    large, small = ways((4, 50, 0.9), (8, 100, 0.0)), ways((4, 10, 0.06), (8, 20, 0.01), (16, 30, 0.0))
    assert spend({"large": large, "small": small}, 80) == {"large": 4, "small": 16}


def slowly(stages: dict[str, Ways], budget: int) -> dict[str, int]:
    """In each turn look at all next stages that fit."""
    at = dict.fromkeys(stages, 0)
    while True:
        held = sum(stages[key][n].bytes for key, n in at.items())
        options = []
        for key, n in at.items():
            if n + 1 < len(stages[key]):
                here, there = stages[key][n], stages[key][n + 1]
                if held - here.bytes + there.bytes <= budget:
                    options.append(((here.error - there.error) / (there.bytes - here.bytes), key))
        if not options:
            return {key: stages[key][n].choice for key, n in at.items()}
        at[max(options)[1]] += 1


@pytest.mark.parametrize("seed", range(20))
def test_against_the_rule_played_out(seed: int) -> None:
    rng = random.Random(seed)
    stages = {}
    for key in "abcdefg":
        size, error = rng.randint(5, 60), rng.random()
        stages[key] = ways((4, size, error), (8, 2 * size, error * rng.random()), (16, 4 * size, 0.0))
    least, most = (sum(w[i].bytes for w in stages.values()) for i in (0, 2))
    budget = rng.randint(least, most)
    chosen = spend(stages, budget)
    assert chosen == slowly(stages, budget)
    assert sum(s.bytes for key, w in stages.items() for s in w if s.choice == chosen[key]) <= budget
