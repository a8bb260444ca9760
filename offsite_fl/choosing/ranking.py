"""Which candidates come before which, which one to take, and why, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offsite_fl.choosing.kinds import TEXT, Kind
from offsite_fl.choosing.over_seeds import shown
from offsite_fl.choosing.standing import Standing, Verdict, is_clear
from offsite_fl.choosing.yardstick import LOSS, Yardstick

# What protects comes first, what can't be handed out last; inside a tier the better plug-in or gradient.
TIERS: dict[Verdict, int] = {
    "protects": 0,
    "worse than the full model": 0,
    "gives the model away": 1,
    "gap not clear": 2,
    "as good as the full model": 2,
    "over budget": 3,
    "failed": 4,
}


@dataclass(frozen=True)
class Recommendation:
    """The candidate to take, None where there is none, and the reason."""

    best: Standing | None
    why: str


def ranked(standings: Iterable[Standing], judged_in: Yardstick = LOSS) -> tuple[Standing, ...]:
    """Best first."""
    return tuple(sorted(standings, key=lambda standing: _order(standing, judged_in)))


def _order(standing: Standing, judged_in: Yardstick) -> tuple[int, float]:
    merit, plug_in = math.nan, standing.figures(judged_in).plug_in
    if plug_in is not None:
        merit = judged_in.more_is * plug_in.mean
    elif standing.cosine is not None:
        merit = -standing.cosine.mean
    return TIERS[standing.verdict], math.inf if math.isnan(merit) else merit


def recommend(
    standings: Sequence[Standing], budget: str, zero_shot: float | None, public_loss: float, kind: Kind = TEXT
) -> Recommendation:
    """Pick one of ``standings``, which are ranked.

    With tuning: the best plug-in among those that protect or, if none of these gains, whose gap at least is clear; one
    that gains nothing clear on the untuned model is never taken. Without: the best gradient among those that are worse
    than the full model on public data by more than 0.02 nats.

    Args:
        standings: ranked candidates.
        budget: as people read it.
        zero_shot: what the untuned full model has on the test data of what is judged in; None where nothing was tuned.
        public_loss: its loss on public data.
        kind: what the comparison is about.
    """
    fitting = [s for s in standings if TIERS[s.verdict] <= TIERS["gap not clear"]]
    within = f"within the budget of {budget}"
    if not fitting:
        return _nothing(f"none could be measured {within}")
    if zero_shot is None:
        return _by_gradient(fitting, within, public_loss, kind.public)
    return _by_plug_in(fitting, within, zero_shot, kind.judged_in)


def _nothing(why: str) -> Recommendation:
    return Recommendation(None, f"No candidate to take: {why}.")


def _by_plug_in(fitting: Sequence[Standing], within: str, zero: float, by: Yardstick) -> Recommendation:
    for verdict in ("protects", "gives the model away"):
        held = [s for s in fitting if s.verdict == verdict]
        gain = held[0].figures(by).gain if held else None
        if gain is not None and is_clear(gain, by):
            return Recommendation(held[0], _why_plug_in(held[0], len(held), within, zero, by))
    first = fitting[0]
    if first.verdict == "gap not clear":
        return _nothing(f"{_none_of(len(fitting))} {within} keeps the tuned emulator clearly behind the plug-in")
    found, advice = first.figures(by), ""
    if found.of_adapter is None:
        advice = "; nor does the same adapter on the uncompressed model: more steps or another rate may help"
    return _nothing(
        f"{within} and with the tuned emulator behind the plug-in, the best plug-in ({first.spec}) has "
        f"{by.level(found.plug_in)} {by.unit} against {by.told(zero)} untuned, so nothing is clearly gained{advice}"
    )


def _why_plug_in(best: Standing, count: int, within: str, zero: float, by: Yardstick) -> str:
    found = best.figures(by)
    part = "" if found.of_adapter is None else f", {found.of_adapter.mean:.0%} of what this adapter can gain"
    gain = f"{by.level(found.plug_in)} {by.unit} against {by.told(zero)} untuned{part}"
    if best.verdict == "protects":
        among = (
            f"It has the best plug-in of the {count} that protect" if count > 1 else "It is the only one that protects"
        )
        return (
            f"{among} {within} ({gain}); its tuned emulator stays {by.step(found.gap)} {by.step_unit} behind the "
            f"plug-in and {by.step(found.margin)} behind the untuned model."
        )
    among = "It is the only one that keeps"
    among = among if count == 1 else f"It has the best plug-in of the {count} that keep"
    assert found.margin is not None  # without it there is no such verdict
    compared = f"{by.told_step(-found.margin.mean)} {by.step_unit} better"
    if found.margin.mean >= 0:
        compared = "not clearly worse"
    return (
        f"{among} the tuned emulator behind the plug-in {within} ({gain}; gap {by.step(found.gap)}), but take care: "
        f"that emulator is {compared} than the untuned model, which is given away."
    )


def _by_gradient(fitting: Sequence[Standing], within: str, public_loss: float, public: str) -> Recommendation:
    lossy = [s for s in fitting if s.verdict == "worse than the full model"]
    if not lossy:
        return _nothing(
            f"{_none_of(len(fitting))} {within} is clearly worse than the full model on {public} (loss "
            f"{public_loss:.3f}), so to hand it out gives the model away"
        )
    best, count = lossy[0], len(lossy)
    among = f"It keeps the adapter's gradient best of the {count} candidates" if count > 1 else "It is the only one"
    numbers = f"cosine {shown(best.cosine)}, loss {shown(best.public_loss)} against {public_loss:.3f}"
    return Recommendation(
        best,
        f"{among} {within} whose emulator is clearly worse than the full model on {public} ({numbers}); nothing was "
        "tuned, so what its plug-in gains isn't known, which data would show.",
    )


def _none_of(count: int) -> str:
    return f"none of the {count}" if count > 1 else "not even the only one"
