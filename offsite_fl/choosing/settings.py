"""What a comparison is made with, apart from the model and the texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.candidates import DEFAULTS, distinct
from offsite_fl.config import TuneConfig, check


def default_tune() -> TuneConfig:
    """How each candidate is tuned unless told otherwise: 16 steps of 8 x 128 tokens."""
    return TuneConfig(max_steps=16, batch_size=8, lr=5e-4, schedule="cosine", progress=False)


@dataclass(frozen=True)
class Settings:
    """How candidates are built, tuned and measured.

    ``tune`` is how a data owner tunes; its ``lr`` and ``seed`` are replaced by ``rates`` (none: ``lr`` alone) and
    ``seeds``, its ``seed`` also divides the private text. Of several rates the one counts that does best on the data
    owner's own validation text, by the emulator's loss. ``full_rates`` are those of full fine-tuning, which is run if
    ``full_fine_tuning`` says so. ``scales`` multiply the update before it is plugged in; the scale that does best on
    public text is reported beside the plain plug-in.

    Methods work on the first ``calibration_tokens`` of the public text; losses and gradients are measured on the
    ``held_out_tokens`` behind them, which no method sees. ``test_tokens`` bounds the private test data.
    """

    budget: Budget = field(default_factory=lambda: Budget(share=0.5))
    candidates: tuple[str, ...] = DEFAULTS
    tune: TuneConfig = field(default_factory=default_tune)
    rates: tuple[float, ...] = ()
    full_rates: tuple[float, ...] = (5e-5, 1e-4)
    full_fine_tuning: bool = False
    seeds: tuple[int, ...] = (0,)
    scales: tuple[float, ...] = (1.0,)
    calibration_tokens: int = 8192
    held_out_tokens: int = 2048
    test_tokens: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", distinct(self.candidates, self.budget))
        object.__setattr__(self, "rates", tuple(self.rates) or (self.tune.lr,))
        check(bool(self.candidates), "there is no candidate; name at least one emulator")
        for name in ("rates", "full_rates", "scales"):
            values = getattr(self, name)
            good = bool(values) and all(math.isfinite(v) and v > 0 for v in values)
            check(good, f"{name.replace('_', '-')} must be one or more numbers above 0, got {_listed(values)}")
        check(bool(self.seeds), "seeds: give at least one")
        check(min(self.seeds) >= 0, f"seeds must be 0 or above, got {_listed(self.seeds)}")
        check(len(set(self.seeds)) == len(self.seeds), f"seeds: {_listed(self.seeds)} names one twice")
        for name in ("calibration_tokens", "held_out_tokens", "test_tokens"):
            check(getattr(self, name) >= 1, f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
