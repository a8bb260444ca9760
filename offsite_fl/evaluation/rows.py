"""The five rows of every result, the two numbers drawn from them, and what they mean in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks

ROW_KEYS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_fine_tuning")
ROW_LABELS = {
    "full_zero_shot": "full zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "emulator_tuned": "emulator tuned",
    "plug_in": "plug-in",
    "full_fine_tuning": "full fine-tuning",
}


@dataclass(frozen=True)
class Row:
    """One measured network: ``loss`` in nats per token, or ``accuracy`` as a share in [0, 1]; exactly one of them.

    Beside an accuracy there may be ``f1``, the macro F1 of a classifier, in [0, 1]; gap and recovered are in accuracy.

    A loss may be NaN or infinite (a run that diverged is a result too); it is written to JSON as null.

    >>> round(Row(loss=2.0).perplexity, 3)
    7.389
    """

    loss: float | None = None
    accuracy: float | None = None
    f1: float | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.accuracy is None):
            raise DataError("a row holds either a loss or an accuracy, exactly one of them")
        if self.loss is not None and self.loss < 0:
            raise DataError(f"a loss in nats per token can't be negative, got {self.loss}")
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise DataError(f"an accuracy is a share between 0 and 1, got {self.accuracy}")
        if self.f1 is not None and (self.accuracy is None or not 0 <= self.f1 <= 1):
            raise DataError(f"an F1 is a share between 0 and 1 beside an accuracy, got {self.f1}")

    @property
    def measure(self) -> Literal["loss", "accuracy"]:
        """Which of the two this row holds."""
        return "accuracy" if self.loss is None else "loss"

    @property
    def value(self) -> float:
        """The number that is held, whichever it is."""
        return self.loss if self.loss is not None else float(self.accuracy or 0.0)

    @property
    def score(self) -> float:
        """The number with its sign set so that more is better: minus the loss, or the accuracy."""
        return self.value if self.loss is None else -self.loss

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows, NaN for a row in accuracy."""
        if self.loss is None:
            return math.nan
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, float | None]:
        """What report.json holds for this row."""
        if self.loss is None:
            return {"accuracy": self.accuracy} | ({} if self.f1 is None else {"f1": self.f1})
        return {"loss": _finite(self.loss), "perplexity": _finite(self.perplexity)}

    @classmethod
    def from_dict(cls, value: object, where: str = "row") -> Row:
        """Read what :meth:`to_dict` wrote; the perplexity is derived from the loss, never trusted."""
        found = checks.entries(value, where, optional=("loss", "perplexity", "accuracy", "f1"))
        if "accuracy" in found and "loss" not in found:
            f1 = checks.number(found["f1"], f"{where}.f1") if "f1" in found else None
            return cls(accuracy=checks.number(found["accuracy"], f"{where}.accuracy"), f1=f1)
        if "loss" in found and "accuracy" not in found:
            return cls(loss=checks.number(found["loss"], f"{where}.loss"))
        raise DataError(f"{where} must hold loss or accuracy, exactly one of them; it has {sorted(found)}")


@dataclass(frozen=True)
class FiveRows:
    """The five rows in their fixed order; the fifth may be missing where the baseline was not run.

    >>> rows = FiveRows(Row(4.0), Row(6.0), Row(5.0), Row(3.5), Row(3.0))
    >>> rows.gap, rows.recovered
    (1.5, 0.5)
    """

    full_zero_shot: Row
    emulator_zero_shot: Row
    emulator_tuned: Row
    plug_in: Row
    full_fine_tuning: Row | None = None

    def __post_init__(self) -> None:
        if len({row.measure for _, row in self}) > 1:
            raise DataError("all rows of a result must hold the same measure: losses or accuracies, not both")

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """``(key, row)`` in the fixed order, without a missing fifth."""
        for key in ROW_KEYS:
            row = getattr(self, key)
            if row is not None:
                yield key, row

    @property
    def measure(self) -> Literal["loss", "accuracy"]:
        """What the rows hold."""
        return self.full_zero_shot.measure

    @property
    def has_f1(self) -> bool:
        """Whether a row holds an F1 beside its accuracy."""
        return any(row.f1 is not None for _, row in self)

    @property
    def gap(self) -> float | None:
        """How much better the plug-in is than the tuned emulator: the owner's protection.

        In nats per token ``loss(emulator tuned) - loss(plug-in)``, or in accuracy ``plug-in - emulator tuned``. None
        where one of the two isn't finite.
        """
        return _finite(self.plug_in.score - self.emulator_tuned.score)

    @property
    def recovered(self) -> float | None:
        """``(plug-in - zero-shot) / (full fine-tuning - zero-shot)``, in log-perplexity or in accuracy.

        None where full fine-tuning wasn't run or gains nothing, and where a number isn't finite.
        """
        if self.full_fine_tuning is None:
            return None
        possible = self.full_fine_tuning.score - self.full_zero_shot.score
        if not possible > 0 or math.isinf(possible):
            return None
        return _finite((self.plug_in.score - self.full_zero_shot.score) / possible)

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds under ``rows``; a fifth row that wasn't run is null."""
        return {key: row.to_dict() if (row := getattr(self, key)) else None for key in ROW_KEYS}

    @classmethod
    def from_dict(cls, value: object, where: str = "rows") -> FiveRows:
        """Read what :meth:`to_dict` wrote."""
        found = checks.entries(value, where, required=ROW_KEYS[:4], optional=ROW_KEYS[4:])
        rows = {key: Row.from_dict(found[key], f"{where}.{key}") for key in ROW_KEYS[:4]}
        fifth = found.get("full_fine_tuning")
        last = None if fifth is None else Row.from_dict(fifth, f"{where}.full_fine_tuning")
        return cls(**rows, full_fine_tuning=last)


@dataclass(frozen=True)
class Verdict:
    """What the five rows say, for a reader who knows none of the words.

    ``protected`` is True where the tuned emulator stays worse than the untuned full model, so that what a data owner
    can keep is worth less than what the model owner had to begin with; None where it can't be told.
    """

    gain: str
    protection: str
    protected: bool | None


def verdict(rows: FiveRows) -> Verdict:
    """The two sentences that the five rows come down to."""
    tuned, zero, gain = rows.emulator_tuned, rows.full_zero_shot, _gain(rows)
    if not (math.isfinite(tuned.value) and math.isfinite(zero.value)):
        return Verdict(gain, "Protection can't be told: a loss isn't finite.", None)
    pair = f"{noun(tuned)} {show(tuned)} against {show(zero)}"
    if tuned.score < zero.score:
        worse = _distance(tuned, zero)
        return Verdict(
            gain, f"Protected: the tuned emulator is {worse} worse than the untuned full model ({pair}).", True
        )
    better = "as good as" if tuned.score == zero.score else f"{_distance(tuned, zero)} better than"
    return Verdict(gain, f"NOT protected: the tuned emulator is {better} the untuned full model ({pair}).", False)


def _gain(rows: FiveRows) -> str:
    zero, plug, full = rows.full_zero_shot, rows.plug_in, rows.full_fine_tuning
    if not math.isfinite(plug.value):
        return "The plug-in model diverged: its loss isn't a finite number."
    moved = f"{noun(zero)} {show(zero)} to {show(plug)}"
    share = rows.recovered
    if full is None or share is None:
        better = "improves on" if plug.score > zero.score else "is no better than"
        why = "full fine-tuning was not run" if full is None else "full fine-tuning gains nothing to compare with"
        return f"The plug-in model {better} the untuned full model ({moved}; {why})."
    numbers = f"{moved}; full fine-tuning {show(full)}"
    if share <= 0:
        return f"The plug-in model is no better than the untuned full model ({numbers})."
    return f"The plug-in model gains {share:.0%} of what full fine-tuning gains ({numbers})."


def _distance(one: Row, other: Row) -> str:
    """How far two rows lie apart, in words: points of accuracy, or the change of perplexity from ``other``."""
    if one.loss is None:
        return f"{100 * abs(one.value - other.value):.1f} points"
    change = abs(one.perplexity / other.perplexity - 1) if math.isfinite(one.perplexity) else math.inf
    if not math.isfinite(change):
        return f"{abs(one.value - other.value):.2f} nats per token"
    return f"{change:.0%}" if change >= 0.1 else f"{change:.1%}"


def noun(row: Row) -> str:
    """What the row is shown as: ``perplexity`` or ``accuracy``."""
    return "accuracy" if row.loss is None else "perplexity"


def show(row: Row) -> str:
    """The row's number as a reader wants it: the perplexity (``66.4``) or the accuracy in per cent (``71.2%``)."""
    return f"{row.value:.1%}" if row.loss is None else significant(row.perplexity)


def significant(value: float, digits: int = 3) -> str:
    """``value`` with that many significant digits, thousands separated; ``diverged`` where it isn't finite.

    >>> significant(55.912), significant(12345.6), significant(0.01234), significant(3.2e9)
    ('55.9', '12,346', '0.0123', '3.2e+09')
    """
    if not math.isfinite(value):
        return "diverged"
    if value == 0:
        return "0"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 999.9 counts as 1000
    if size >= 7 or size < -4:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
