"""What a comparison is made with, apart from the model and the texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.candidates import DEFAULTS, check_candidates, distinct
from offsite_fl.choosing.kinds import TEXT, Kind
from offsite_fl.config import TuneConfig, check

Part = Literal["calibration", "held_out", "test"]
HEADS_FROM = ("calibration", "model")
PARTS: tuple[Part, ...] = ("calibration", "held_out", "test")


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
    ``held_out_tokens`` behind them, which no method sees. ``test_tokens`` bounds the private test data. For a
    classifier, where ``kind`` counts examples, the same are ``*_examples``. ``head_from`` says whether a classifier
    begins with the nearest-class-mean head of the calibration examples or with the head that it has. ``repair`` adds
    the plug-in with the repair taken out.
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
    calibration_examples: int = 256
    held_out_examples: int = 64
    test_examples: int = 400
    kind: Kind = TEXT
    head_from: str = "calibration"
    repair: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", distinct(self.candidates, self.budget))
        object.__setattr__(self, "rates", tuple(self.rates) or (self.tune.lr,))
        check(bool(self.candidates), "there is no candidate; name at least one emulator")
        check_candidates(self.candidates, self.budget)
        for name in ("rates", "full_rates", "scales"):
            values = getattr(self, name)
            good = bool(values) and all(math.isfinite(v) and v > 0 for v in values)
            check(good, f"{name.replace('_', '-')} must be one or more numbers above 0, got {_listed(values)}")
        check(bool(self.seeds), "seeds: give at least one")
        check(min(self.seeds) >= 0, f"seeds must be 0 or above, got {_listed(self.seeds)}")
        check(len(set(self.seeds)) == len(self.seeds), f"seeds: {_listed(self.seeds)} names one twice")
        for name in (f"{part}_{self.kind.unit}" for part in PARTS):
            check(getattr(self, name) >= 1, f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        check(self.head_from in HEADS_FROM, f"head-from is calibration or model, got {self.head_from!r}")

    @property
    def sizes(self) -> dict[Part, int]:
        """How much each part may hold, in the kind's unit."""
        return {part: getattr(self, f"{part}_{self.kind.unit}") for part in PARTS}

    def most(self, part: Part) -> int:
        """How many examples ``part`` may hold, at least one."""
        return max(1, self.sizes[part] // (self.tune.block_size if self.kind.unit == "tokens" else 1))


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
