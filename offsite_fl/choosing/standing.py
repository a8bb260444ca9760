"""Where one candidate stands: its cells over all seeds, set against the full model and the uncompressed middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.candidates import is_template
from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.choosing.results import Built, Cell, Numbers, OnPublicText, Tuned
from offsite_fl.choosing.yardstick import ACCURACY, CLEAR_NATS, LOSS, Yardstick
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
CLEAR_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What tuning is worth in one number, the loss or the accuracy; None where not all seeds tell.

    * ``gain``: how much better the plug-in is than the untuned full model;
    * ``gap``: how far the tuned emulator, which data owners keep, stays behind the plug-in, which the owner gets;
    * ``margin``: how far it stays behind the untuned full model; below 0 the model is given away;
    * ``of_adapter``: the plug-in's gain on the untuned model as a share of that of the same adapter tuned on the
      uncompressed middle;
    * ``recovered``: the same as a share of full fine-tuning's gain;
    * ``without_repair``: the plug-in with the repair taken out.
    """

    emulator_zero_shot: OverSeeds | None = None
    emulator_tuned: OverSeeds | None = None
    plug_in: OverSeeds | None = None
    gain: OverSeeds | None = None
    gap: OverSeeds | None = None
    margin: OverSeeds | None = None
    of_adapter: OverSeeds | None = None
    recovered: OverSeeds | None = None
    without_repair: OverSeeds | None = None


@dataclass(frozen=True, kw_only=True)
class Standing(Figures):
    """One candidate. Its own figures are in nats per token (of a classifier: per example), ``accuracy`` has the others.

    What a seed can't tell for all seeds is None. ``asked_bytes`` is what the budget came to, None for a candidate with
    a size of its own. ``public_*``, hidden error and gradients are of the untuned emulator on held-out public data, the
    figures of the data owner's test data.
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
    scale: OverSeeds | None = None
    plug_in_scaled: OverSeeds | None = None
    accuracy: Figures | None = None
    notes: tuple[str, ...] = ()

    def figures(self, yardstick: Yardstick) -> Figures:
        """Those in one number."""
        return self if yardstick.name == "loss" else self.accuracy or Figures()


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

    def best_of_adapter(self, seed: int, yardstick: Yardstick) -> float | None:
        """What the same adapter reaches when it is tuned on the uncompressed model."""
        return _plug_in(self.uncompressed.get(seed), yardstick)

    def best_of_all(self, seed: int, yardstick: Yardstick) -> float | None:
        """What full fine-tuning reaches; None if it wasn't run."""
        return _plug_in(self.full.get(seed), yardstick)


def _plug_in(cell: Cell | None, yardstick: Yardstick) -> float | None:
    numbers = None if cell is None or cell.tuned is None else yardstick.read(cell.tuned)
    return None if numbers is None else numbers.plug_in


def standing_of(cells: Sequence[Cell], reference: Reference, budget: Budget, judged_in: Yardstick = LOSS) -> Standing:
    """Put the cells of one candidate, one for each seed, together and judge them."""
    first = cells[0]
    good = [cell for cell in cells if cell.error is None]
    errors = _errors(cells)
    if not good:
        return Standing(candidate=first.candidate, spec=first.spec, verdict="failed", seeds=(), errors=errors)
    built = [cell.built for cell in good if cell.built is not None]
    public = [cell.public for cell in good if cell.public is not None]
    middle = built[0].middle_bytes
    allowed = budget.bytes_of(middle)
    size = round(sum(b.bytes for b in built) / len(built))
    figures = {yardstick.name: _figures(good, reference, yardstick) for yardstick in (LOSS, ACCURACY)}
    public_margin = _over_seeds(public, lambda p: p.emulator_loss - p.full_loss)
    over = size > allowed * (1 + TOLERANCE)
    errors += tuple(f"{what} isn't a finite number" for what in _not_finite(good))
    judged = judge(Figures(**figures[judged_in.name]), public_margin, judged_in)
    return Standing(
        candidate=first.candidate,
        spec=first.spec,
        verdict="failed" if errors else "over budget" if over else judged,
        seeds=tuple(cell.seed for cell in good),
        errors=errors,
        asked_bytes=allowed if is_template(first.candidate) else None,
        bytes=size,
        share=size / middle,
        **_of_build(built),
        **_of_public(public),
        public_margin=public_margin,
        rates=tuple(cell.tuned.rate for cell in good if cell.tuned is not None),
        **figures["loss"],
        accuracy=Figures(**figures["accuracy"]) if figures["accuracy"] else None,
        scale=_both(good, lambda t: t.best_scale.scale if t.best_scale else None),
        plug_in_scaled=_both(good, lambda t: t.best_scale.plug_in if t.best_scale else None),
    )


def judge(figures: Figures, public_margin: OverSeeds, judged_in: Yardstick = LOSS) -> Verdict:
    """What a candidate within the budget is, from its gap and margin or, where nothing was tuned, on public data."""
    if figures.gap is None or figures.margin is None:
        return "worse than the full model" if public_margin.mean > CLEAR_NATS else "as good as the full model"
    if not is_clear(figures.gap, judged_in):
        return "gap not clear"
    return "gives the model away" if figures.margin.mean < _noise(figures.margin) else "protects"


def is_clear(found: OverSeeds, judged_in: Yardstick = LOSS) -> bool:
    """Whether a gap or a gain is clearly above 0: by more than two standard errors over the seeds, and by more than the
    yardstick's own bound, below which one test set tells nothing however well the seeds agree.
    """
    return found.mean > max(judged_in.clear, _noise(found))


def _noise(found: OverSeeds) -> float:
    """What a number over several seeds may be off by; 0 for one seed, of which it isn't known."""
    return CLEAR_ERRORS * (found.standard_error or 0.0)


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


def _figures(cells: Sequence[Cell], reference: Reference, yardstick: Yardstick) -> dict[str, Any]:
    """The entries of :class:`Figures` in one number; none where the cells don't have it."""
    if not all(cell.tuned is not None and yardstick.read(cell.tuned) for cell in cells):
        return {}

    def both(number: Callable[[Numbers], float | None]) -> OverSeeds | None:
        return _both(cells, lambda tuned: None if (n := yardstick.read(tuned)) is None else number(n))

    def behind(n: Numbers, other: float) -> float | None:
        return None if n.emulator_tuned is None else yardstick.behind(n.emulator_tuned, other)

    return {
        "emulator_zero_shot": both(lambda n: n.emulator_zero_shot),
        "emulator_tuned": both(lambda n: n.emulator_tuned),
        "plug_in": both(lambda n: n.plug_in),
        "gain": both(lambda n: yardstick.behind(n.zero_shot, n.plug_in)),
        "gap": both(lambda n: behind(n, n.plug_in)),
        "margin": both(lambda n: behind(n, n.zero_shot)),
        "of_adapter": _share_of_gain(cells, reference.best_of_adapter, yardstick),
        "recovered": _share_of_gain(cells, reference.best_of_all, yardstick),
        "without_repair": both(lambda n: n.without_repair),
    }


def _both(cells: Sequence[Cell], number: Callable[[Tuned], float | None]) -> OverSeeds | None:
    """``number`` of every seed's tuning; None unless all seeds have it."""
    found = [number(cell.tuned) for cell in cells if cell.tuned is not None]
    known = [value for value in found if value is not None]
    return OverSeeds.of(known) if known and len(known) == len(cells) else None


def _over_seeds(public: Sequence[OnPublicText], number: Callable[[OnPublicText], float]) -> OverSeeds:
    return OverSeeds.of(number(entry) for entry in public)


def _share_of_gain(
    cells: Sequence[Cell], upper: Callable[[int, Yardstick], float | None], yardstick: Yardstick
) -> OverSeeds | None:
    """The plug-in's gain as a share of what ``upper`` gains with the same seed; None where that gains nothing."""
    shares = []
    for cell in cells:
        most, numbers = upper(cell.seed, yardstick), None if cell.tuned is None else yardstick.read(cell.tuned)
        if numbers is None or most is None:
            return None
        zero = numbers.zero_shot
        if not (math.isfinite(most) and yardstick.behind(zero, most) > 0):
            return None
        shares.append((zero - numbers.plug_in) / (zero - most))
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
