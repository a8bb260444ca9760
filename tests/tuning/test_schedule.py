"""Schedules written out by hand."""

import math

import pytest

from offsite_fl.config import TuneConfig
from offsite_fl.tuning.schedule import learning_rate


def rates(total, steps, **settings):
    config = TuneConfig(lr=2.0, **settings)
    return [learning_rate(config, step, total) for step in range(steps)]


def test_constant_with_warmup():
    assert rates(5, 5, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_linear():
    assert rates(4, 4, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(6, 6, schedule="linear", warmup_steps=2) == pytest.approx([2 / 3, 4 / 3, 2.0, 1.5, 1.0, 0.5])


def test_cosine():
    half = 1 / math.sqrt(2)
    assert rates(4, 4, schedule="cosine") == pytest.approx([2.0, 1 + half, 1.0, 1 - half])


def test_never_zero_past_the_end_or_in_a_schedule_that_is_all_warmup():
    assert rates(4, 7, schedule="linear")[4:] == pytest.approx([0.5] * 3)
    assert rates(2, 4, schedule="cosine", warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0])
