"""Where one candidate stands: its cells over all seeds, set against the full model and the uncompressed middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.candidates import is_template
from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.choosing.results import Built, Cell, OnPublicText, Tuned
from offsite_fl.emulators.budget import TOLERANCE

Verdict = Literal[
    "protects",
    "gives the model away",
    "gap not clear",
    "worse than the full model",
    "as good as the full model",
    "over budget",
    "failed",
]
# With one seed there is no standard error, so a gap must be larger than what seeds usually make of it. On public text
# the same keeps emulators out that are the full model but for rounding.
CLEAR_NATS = 0.02
CLEAR_ERRORS = 2.0


@dataclass(frozen=True)
class Standing:
    """One candidate. Losses are nats per token; what a seed can't tell for all seeds is None.

    ``asked_bytes`` is what the budget came to, None for a candidate with a size of its own. ``public_*``, hidden error
    and gradients are of the untuned emulator on held-out public text, everything from ``emulator_zero_shot`` on of the
    data owner's test data:

    * ``gap`` = emulator tuned - plug-in: how far what data owners keep stays behind what the owner gets;
    * ``margin`` = emulator tuned - untuned full model; below 0 the model is given away;
    * ``of_adapter`` = (untuned - plug-in) / (untuned - the same adapter tuned on the uncompressed middle);
    * ``recovered`` = (untuned - plug-in) / (untuned - full fine-tuning).
    """

    candidate: str
    spec: str
    verdict: Verdict
    seeds: tuple[int, ...]
    errors: tuple[str, ...] = ()
    asked_bytes: int | None = None
    bytes: int | None = None
    share: float | None = None
    verbatim_share: float | None = None
    flops_share: float | None = None
    build_seconds: float | None = None
    peak_bytes: int | None = None
    public_loss: OverSeeds | None = None
    public_margin: OverSeeds | None = None
    hidden_error: OverSeeds | None = None
    cosine: OverSeeds | None = None
    norm_ratio: OverSeeds | None = None
    cosine_by_block: tuple[float, ...] = ()
    norm_ratio_by_block: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    emulator_zero_shot: OverSeeds | None = None
    emulator_tuned: OverSeeds | None = None
    plug_in: OverSeeds | None = None
    gap: OverSeeds | None = None
    margin: OverSeeds | None = None
    of_adapter: OverSeeds | None = None
    recovered: OverSeeds | None = None
    scale: OverSeeds | None = None
    plug_in_scaled: OverSeeds | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What candidates are set against, by seed: the plug-in of the uncompressed middle and of full fine-tuning."""

    uncompressed: Mapping[int, Cell]
    full: Mapping[int, Cell]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Reference:
        """Pick the references out of all cells; those that failed are left out."""
        good = [cell for cell in cells if cell.error is None]
        return cls(
            {cell.seed: cell for cell in good if cell.role == "uncompressed"},
            {cell.seed: cell for cell in good if cell.role == "full-fine-tuning"},
        )

    def best_of_adapter(self, seed: int) -> float | None:
        """Loss of the same adapter tuned on the uncompressed model."""
        return _plug_in(self.uncompressed.get(seed))

    def best_of_all(self, seed: int) -> float | None:
        """Loss of full fine-tuning; None if it wasn't run."""
        return _plug_in(self.full.get(seed))


def _plug_in(cell: Cell | None) -> float | None:
    return None if cell is None or cell.tuned is None else cell.tuned.plug_in


def standing_of(cells: Sequence[Cell], reference: Reference, budget: Budget) -> Standing:
    """Put the cells of one candidate, one for each seed, together and judge them."""
    first = cells[0]
    good = [cell for cell in cells if cell.error is None]
    errors = _errors(cells)
    if not good:
        return Standing(first.candidate, first.spec, "failed", (), errors)
    built = [cell.built for cell in good if cell.built is not None]
    public = [cell.public for cell in good if cell.public is not None]
    middle = built[0].middle_bytes
    allowed = budget.bytes_of(middle)
    size = round(sum(b.bytes for b in built) / len(built))
    gap, margin = _both(good, _gap), _both(good, _margin)
    public_margin = _over_seeds(public, lambda p: p.emulator_loss - p.full_loss)
    over = size > allowed + TOLERANCE * middle
    plug_in = _both(good, lambda t: t.plug_in)
    errors += tuple(f"{what} isn't a finite number" for what in _not_finite(good))
    return Standing(
        candidate=first.candidate,
        spec=first.spec,
        verdict="failed" if errors else "over budget" if over else judge(gap, margin, public_margin),
        seeds=tuple(cell.seed for cell in good),
        errors=errors,
        asked_bytes=allowed if is_template(first.candidate) else None,
        bytes=size,
        share=size / middle,
        **_of_build(built),
        **_of_public(public),
        public_margin=public_margin,
        rates=tuple(cell.tuned.rate for cell in good if cell.tuned is not None),
        emulator_zero_shot=_both(good, lambda t: t.emulator_zero_shot),
        emulator_tuned=_both(good, lambda t: t.emulator_tuned),
        plug_in=plug_in,
        gap=gap,
        margin=margin,
        of_adapter=_share_of_gain(good, reference.best_of_adapter),
        recovered=_share_of_gain(good, reference.best_of_all),
        scale=_both(good, lambda t: t.best_scale.scale if t.best_scale else None),
        plug_in_scaled=_both(good, lambda t: t.best_scale.plug_in if t.best_scale else None),
    )


def judge(gap: OverSeeds | None, margin: OverSeeds | None, public_margin: OverSeeds) -> Verdict:
    """What a candidate within the budget is, from its gap and margin or, where nothing was tuned, on public text."""
    if gap is None or margin is None:
        return "worse than the full model" if public_margin.mean > CLEAR_NATS else "as good as the full model"
    if not is_clear(gap):
        return "gap not clear"
    return "gives the model away" if margin.mean < 0 else "protects"


def is_clear(gap: OverSeeds) -> bool:
    """Whether a gap is clearly above 0: by two standard errors over seeds, or with one seed by 0.02 nats."""
    error = gap.standard_error
    return gap.mean > (CLEAR_NATS if error is None else max(0.0, CLEAR_ERRORS * error))


def _not_finite(cells: Sequence[Cell]) -> list[str]:
    """Losses without which a candidate can't be judged and that aren't numbers; one that was kept on disk is None."""
    losses: dict[str, list[float | None]] = {
        "the emulator's loss on public text": [c.public.emulator_loss for c in cells if c.public is not None],
        "the tuned emulator's loss": [c.tuned.emulator_tuned for c in cells if c.tuned is not None],
        "the plug-in's loss": [c.tuned.plug_in for c in cells if c.tuned is not None],
    }
    return [what for what, several in losses.items() if not all(v is not None and math.isfinite(v) for v in several)]


def _errors(cells: Sequence[Cell]) -> tuple[str, ...]:
    """What went wrong, once for all seeds if it is the same for all."""
    failed = {cell.seed: cell.error for cell in cells if cell.error is not None}
    if len(failed) == len(cells) and len(set(failed.values())) == 1:
        return (str(next(iter(failed.values()))),)
    return tuple(f"seed {seed}: {error}" for seed, error in failed.items())


def _gap(tuned: Tuned) -> float | None:
    return None if tuned.emulator_tuned is None else tuned.emulator_tuned - tuned.plug_in


def _margin(tuned: Tuned) -> float | None:
    return None if tuned.emulator_tuned is None else tuned.emulator_tuned - tuned.zero_shot


def _both(cells: Sequence[Cell], number: Callable[[Tuned], float | None]) -> OverSeeds | None:
    """``number`` of every seed's tuning; None unless all seeds have it."""
    found = [number(cell.tuned) for cell in cells if cell.tuned is not None]
    known = [value for value in found if value is not None]
    return OverSeeds.of(known) if known and len(known) == len(cells) else None


def _over_seeds(public: Sequence[OnPublicText], number: Callable[[OnPublicText], float]) -> OverSeeds:
    return OverSeeds.of(number(entry) for entry in public)


def _share_of_gain(cells: Sequence[Cell], upper: Callable[[int], float | None]) -> OverSeeds | None:
    """The plug-in's gain as a share of what ``upper`` gains with the same seed; None where that gains nothing."""
    shares = []
    for cell in cells:
        most = upper(cell.seed)
        if cell.tuned is None or most is None:
            return None
        zero = cell.tuned.zero_shot
        if not (math.isfinite(most) and zero > most):
            return None
        shares.append((zero - cell.tuned.plug_in) / (zero - most))
    return OverSeeds.of(shares)


def _of_build(built: Sequence[Built]) -> dict[str, Any]:
    peaks = [b.peak_bytes for b in built if b.peak_bytes is not None]
    count = len(built)
    return {
        "verbatim_share": sum(b.verbatim_share for b in built) / count,
        "flops_share": sum(b.flops_share for b in built) / count,
        "build_seconds": sum(b.seconds for b in built) / count,
        "peak_bytes": max(peaks, default=None),
        "notes": tuple(dict.fromkeys(note for b in built for note in b.notes)),
    }


def _of_public(public: Sequence[OnPublicText]) -> dict[str, Any]:
    def blocks(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))

    return {
        "public_loss": _over_seeds(public, lambda p: p.emulator_loss),
        "hidden_error": _over_seeds(public, lambda p: p.hidden_error),
        "cosine": _over_seeds(public, lambda p: p.cosine),
        "norm_ratio": _over_seeds(public, lambda p: p.norm_ratio),
        "cosine_by_block": blocks([p.cosine_by_block for p in public]),
        "norm_ratio_by_block": blocks([p.norm_ratio_by_block for p in public]),
    }
