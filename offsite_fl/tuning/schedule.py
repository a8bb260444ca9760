"""Learning-rate schedules that can span the rounds of a federation."""

from __future__ import annotations

import math

from offsite_fl.config import TuneConfig


def learning_rate(config: TuneConfig, step: int, total: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0) of a schedule of ``total`` steps.

    Rises over ``warmup_steps`` and is ``config.lr`` at step ``warmup_steps``; then constant, or falling towards zero
    at ``total`` by a line or half a cosine. Neither end is ever zero: a step without a learning rate would be wasted,
    and a client that takes more steps than planned for stays at the last rate instead of standing still.

    >>> [round(learning_rate(TuneConfig(lr=1.0, schedule="linear", warmup_steps=1), s, 5), 2) for s in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.25]
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant" or total <= warmup:
        return config.lr
    done = (min(step, total - 1) - warmup) / (total - warmup)
    factor = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * factor
