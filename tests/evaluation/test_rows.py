"""Gap, recovered and verdict against numbers worked out by hand."""

import math

import pytest

from offsite_fl.errors import DataError
from offsite_fl.evaluation.rows import ROW_KEYS, FiveRows, Row, show, significant, verdict


def losses(zero: float, emulator: float, tuned: float, plug: float, full: float | None) -> FiveRows:
    return FiveRows(Row(zero), Row(emulator), Row(tuned), Row(plug), None if full is None else Row(full))


def perplexities(*values: float) -> FiveRows:
    return FiveRows(*(Row(math.log(value)) for value in values))


def test_gap_and_recovered_in_nats() -> None:
    rows = losses(4.0, 6.0, 5.0, 3.5, 3.0)
    assert rows.gap == 1.5  # 5.0 - 3.5
    assert rows.recovered == 0.5  # (4.0 - 3.5) / (4.0 - 3.0)


def test_recovered_is_measured_in_log_perplexity() -> None:
    # ln(66.4 / 55.9) = 0.17213, ln(66.4 / 47.3) = 0.33919; in plain perplexity it would be 10.5 / 19.1 = 0.5497.
    rows = perplexities(66.4, 386, 132, 55.9, 47.3)
    assert rows.recovered == pytest.approx(0.5075, abs=1e-4)
    assert rows.gap == pytest.approx(math.log(132 / 55.9))


def test_gap_and_recovered_in_accuracy() -> None:
    rows = FiveRows(*(Row(accuracy=a) for a in (0.50, 0.30, 0.45, 0.60, 0.75)))
    assert rows.gap == pytest.approx(0.15)
    assert rows.recovered == pytest.approx(0.4)  # .10 / .25


@pytest.mark.parametrize("full", [None, 4.0, 4.5, math.nan, math.inf])
def test_no_share_of_a_gain_that_is_not_there(full: float | None) -> None:
    assert losses(4.0, 6.0, 5.0, 3.5, full).recovered is None


def test_recovered_may_be_negative_or_above_one() -> None:
    assert losses(4.0, 6.0, 5.0, 4.5, 3.0).recovered == -0.5
    assert losses(4.0, 6.0, 5.0, 2.0, 3.0).recovered == 2.0


def test_a_diverged_row_takes_gap_and_recovered_with_it() -> None:
    rows = losses(4.0, 6.0, 5.0, math.nan, 3.0)
    assert rows.gap is None and rows.recovered is None
    assert "diverged" in verdict(rows).gain


def test_order_is_fixed_and_the_fifth_may_be_missing() -> None:
    assert [key for key, _ in losses(4, 6, 5, 3.5, 3)] == list(ROW_KEYS)
    assert [key for key, _ in losses(4, 6, 5, 3.5, None)] == list(ROW_KEYS[:4])


def test_verdict_protected() -> None:
    said = verdict(perplexities(66.4, 386, 132, 55.9, 47.3))
    assert said.gain == (
        "The plug-in model gains 51% of what full fine-tuning gains (perplexity 66.4 to 55.9; full fine-tuning 47.3)."
    )
    # 132 / 66.4 = 1.988
    assert said.protection == (
        "Protected: the tuned emulator is 99% worse than the untuned full model (perplexity 132 against 66.4)."
    )
    assert said.protected is True


@pytest.mark.parametrize(
    ("tuned", "words"), [(50.0, "NOT protected: the tuned emulator is 50% better"), (100.0, "as good as")]
)
def test_verdict_not_protected(tuned: float, words: str) -> None:
    said = verdict(perplexities(100, 386, tuned, 45, 40))
    assert words in said.protection
    assert said.protected is False


def test_verdict_in_accuracy_speaks_of_points() -> None:
    said = verdict(FiveRows(*(Row(accuracy=a) for a in (0.5, 0.3, 0.45, 0.6))))
    assert "5.0 points worse than the untuned full model (accuracy 45.0% against 50.0%)" in said.protection
    assert "improves on" in said.gain and "was not run" in said.gain


def test_verdict_without_any_gain() -> None:
    assert "no better than" in verdict(losses(4.0, 6.0, 5.0, 4.5, 3.0)).gain
    assert "gains nothing to compare with" in verdict(losses(4.0, 6.0, 5.0, 3.9, 4.2)).gain
    assert verdict(losses(math.inf, 6.0, 5.0, 4.5, 3.0)).protected is None


def test_json_round_trip_and_its_exact_form() -> None:
    rows = losses(4.0, 6.0, 5.0, 3.5, None)
    found = rows.to_dict()
    assert list(found) == list(ROW_KEYS)
    assert found["plug_in"] == {"loss": 3.5, "perplexity": pytest.approx(33.11545)}
    assert found["full_fine_tuning"] is None
    assert FiveRows.from_dict(found) == rows
    assert Row(accuracy=0.25).to_dict() == {"accuracy": 0.25}
    assert Row.from_dict({"accuracy": 0.25}) == Row(accuracy=0.25)


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    assert Row(math.nan).to_dict() == {"loss": None, "perplexity": None}
    assert Row(1000.0).to_dict() == {"loss": 1000.0, "perplexity": None}  # exp overflows
    assert math.isnan(Row.from_dict({"loss": None, "perplexity": None}).value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, "exactly one"),
        ({}, "exactly one"),
        ({"loss": "low"}, "row.loss must be a number"),
        ({"loss": -1.0}, "negative"),
        ({"loss": True}, "must be a number"),
        ({"accuracy": 71.0}, "between 0 and 1"),
        ({"losss": 1.0}, "unknown key 'losss'; did you mean 'loss'"),
        ([1.0], "must be an object"),
    ],
)
def test_malformed_rows_are_named(value: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Row.from_dict(value)


def test_missing_rows_and_mixed_measures_are_refused() -> None:
    with pytest.raises(DataError, match="rows lacks emulator_tuned, plug_in"):
        FiveRows.from_dict({"full_zero_shot": {"loss": 1.0}, "emulator_zero_shot": {"loss": 1.0}})
    with pytest.raises(DataError, match="same measure"):
        FiveRows(Row(1.0), Row(1.0), Row(1.0), Row(accuracy=0.5))


@pytest.mark.parametrize(
    ("value", "text"),
    [(55.912, "55.9"), (386.2, "386"), (12345.6, "12,346"), (0.0123456, "0.0123"), (0, "0"), (math.inf, "diverged")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_show() -> None:
    assert show(Row(math.log(66.4))) == "66.4" and show(Row(accuracy=0.7123)) == "71.2%"
