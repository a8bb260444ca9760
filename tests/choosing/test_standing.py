"""Where a candidate stands, reckoned by hand, and the order and choice that follow."""

from __future__ import annotations

import math

import pytest

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.kinds import CLASSES
from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.choosing.ranking import ranked, recommend
from offsite_fl.choosing.results import Cell, ScaleTried
from offsite_fl.choosing.standing import Reference, Standing, standing_of
from offsite_fl.choosing.yardstick import ACCURACY
from offsite_fl.errors import ConfigError
from tests.choosing.conftest import cell, references, right

HALF = Budget(share=0.5)


def stand(*cells: Cell, seeds: tuple[int, ...] = (0,), full: float | None = 2.0) -> Standing:
    return standing_of(cells, Reference.of(references(seeds, full=full)), HALF)


def test_one_seed_by_hand() -> None:
    """Untuned 4.0, tuned emulator 4.5, plug-in 3.5; the adapter can reach 3.0, full fine-tuning 2.0."""
    found = stand(cell(tuned=(4.5, 3.5)))
    assert found.gap is not None and found.gap.mean == 1.0
    assert found.margin is not None and found.margin.mean == 0.5
    assert found.of_adapter is not None and found.of_adapter.mean == 0.5
    assert found.recovered is not None and found.recovered.mean == 0.25
    assert found.share == 0.5 and found.verdict == "protects" and found.seeds == (0,)


def test_three_seeds_by_hand() -> None:
    """Plug-ins 3.4, 3.5, 3.6: mean 3.5, sample deviation 0.1; gaps 1.0, 1.2, 1.4."""
    cells = [cell(seed=s, tuned=(4.4 + 0.3 * s, 3.4 + 0.1 * s)) for s in range(3)]
    found = stand(*cells, seeds=(0, 1, 2))
    assert found.plug_in is not None and found.plug_in.mean == pytest.approx(3.5)
    assert found.plug_in.std == pytest.approx(0.1)
    assert found.plug_in.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.gap is not None and found.gap.values == pytest.approx((1.0, 1.2, 1.4))
    assert found.of_adapter is not None and found.of_adapter.values == pytest.approx((0.6, 0.5, 0.4))


def of_classes(*cells: Cell, seeds: tuple[int, ...] = (0,)) -> Standing:
    return standing_of(cells, Reference.of(references(seeds, classes=True)), HALF, ACCURACY)


def test_accuracy_by_hand() -> None:
    """Untuned 50 %, tuned emulator 45 %, plug-in 80 %; the adapter can reach 90 %, full fine-tuning 100 %."""
    found = of_classes(cell(tuned=(3.4, 3.5), accuracy=right(0.5, 0.45, 0.8)))
    assert found.accuracy is not None and found.accuracy.gap is not None and found.gap is not None
    assert found.accuracy.gap.mean == pytest.approx(0.35) and found.gap.mean == pytest.approx(-0.1)
    assert found.accuracy.margin is not None and found.accuracy.margin.mean == pytest.approx(0.05)
    assert found.accuracy.of_adapter is not None and found.accuracy.of_adapter.mean == pytest.approx(0.75)
    assert found.accuracy.recovered is not None and found.accuracy.recovered.mean == pytest.approx(0.6)
    assert found.verdict == "protects"  # by the accuracies, whatever the losses say


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [((0.5, 0.6, 0.8), "gives the model away"), ((0.5, 0.77, 0.8), "gap not clear"), ((0.5, 0.5, 0.8), "protects")],
)
def test_verdicts_by_accuracy(numbers: tuple[float, float, float], verdict: str) -> None:
    assert of_classes(cell(tuned=(4.5, 3.5), accuracy=right(*numbers))).verdict == verdict


def test_of_classes_the_most_accurate_plug_in_is_taken() -> None:
    """The other one has the better loss."""
    made = [
        of_classes(cell("calm", tuned=(5.0, 3.0), accuracy=right(0.5, 0.4, 0.7))),
        of_classes(cell("right", tuned=(5.0, 3.6), accuracy=right(0.5, 0.4, 0.8))),
    ]
    said = recommend(ranked(made, ACCURACY), "50%", 0.5, 3.0, CLASSES)
    assert said.best is not None and said.best.spec == "right"
    assert "80.0% right against 50.0% untuned" in said.why and "40.0 points behind the plug-in" in said.why


def test_of_classes_what_gains_nothing_is_not_taken() -> None:
    worse = of_classes(cell("worse", tuned=(5.0, 2.0), accuracy=right(0.5, 0.3, 0.45)))
    said = recommend([worse], "50%", 0.5, 3.0, CLASSES)
    assert said.best is None and "45.0% right against 50.0% untuned, so nothing is clearly gained" in said.why


def test_the_plug_in_without_the_repair_over_seeds() -> None:
    found = stand(*(cell(seed=s, without_repair=3.2 + 0.2 * s) for s in (0, 1)), seeds=(0, 1))
    assert found.without_repair is not None and found.without_repair.values == pytest.approx((3.2, 3.4))
    assert stand(cell(without_repair=3.2), cell(seed=1), seeds=(0, 1)).without_repair is None


def test_without_full_fine_tuning_nothing_is_said_of_it() -> None:
    assert stand(cell(), full=None).recovered is None


@pytest.mark.parametrize(
    ("tuned", "verdict"),
    [
        ((4.5, 3.5), "protects"),
        ((3.8, 3.5), "gives the model away"),
        ((3.51, 3.5), "gap not clear"),
        ((3.4, 3.5), "gap not clear"),
    ],
)
def test_verdicts_of_one_seed(tuned: tuple[float, float], verdict: str) -> None:
    assert stand(cell(tuned=tuned)).verdict == verdict


@pytest.mark.parametrize("tuned", [(math.nan, 3.5), (4.5, math.nan)])
def test_what_diverged_failed(tuned: tuple[float, float]) -> None:
    """Before and after a resume, which reads null for a number that isn't finite."""
    made = cell(tuned=tuned)
    for found in (stand(made), stand(Cell.from_dict(made.to_dict()))):
        assert found.verdict == "failed" and found.errors


def test_a_gap_within_the_noise_of_seeds_is_not_clear() -> None:
    """Gaps 0.5 and -0.3: mean 0.1, standard error 0.4."""
    cells = [cell(seed=0, tuned=(4.5, 4.0)), cell(seed=1, tuned=(4.2, 4.5))]
    assert stand(*cells, seeds=(0, 1)).verdict == "gap not clear"


def test_a_gap_that_no_test_set_could_tell_is_not_clear_however_well_seeds_agree() -> None:
    cells = [cell(seed=s, tuned=(3.505, 3.5)) for s in (0, 1)]
    assert stand(*cells, seeds=(0, 1)).verdict == "gap not clear"


@pytest.mark.parametrize(("low", "verdict"), [(3.8, "gives the model away"), (4.3, "protects")])
def test_what_only_some_seeds_protect_is_given_away(low: float, verdict: str) -> None:
    """Untuned 4.0. Margins 0.4 and -0.2: mean 0.1, standard error 0.3. Margins 0.4 and 0.3: 0.35 and 0.05."""
    cells = [cell(seed=0, tuned=(4.4, 3.0)), cell(seed=1, tuned=(low, 3.0))]
    found = stand(*cells, seeds=(0, 1))
    assert found.verdict == verdict
    if verdict != "protects":
        said = recommend([found], "50%", 4.0, 3.0)
        assert said.best is found and "that emulator is not clearly worse than the untuned model" in said.why


def test_more_bytes_than_allowed() -> None:
    """Half of 1,000 is allowed, and 2 % of that half more."""
    assert stand(cell(bytes=510)).verdict == "protects"
    assert stand(cell(bytes=511)).verdict == "over budget"


def test_an_error_of_one_seed_is_told_and_fails_the_candidate() -> None:
    found = stand(cell(seed=0), cell(seed=1, error="no room"), seeds=(0, 1))
    assert found.verdict == "failed" and "no room" in found.errors[0]
    assert stand(cell(error="no room")).plug_in is None


def test_the_best_scale_is_chosen_on_public_text() -> None:
    scales = (ScaleTried(1.0, 3.0, 3.5), ScaleTried(0.7, 2.9, 3.6))
    found = stand(cell(scales=scales))
    assert found.scale is not None and found.scale.mean == 0.7
    assert found.plug_in_scaled is not None and found.plug_in_scaled.mean == 3.6


def test_the_order() -> None:
    made = [
        stand(cell("failed", error="x")),
        stand(cell("over", bytes=900, tuned=(4.5, 2.1))),
        stand(cell("unclear", tuned=(3.0, 3.0))),
        stand(cell("away", tuned=(3.8, 3.1))),
        stand(cell("good", tuned=(4.5, 3.6))),
        stand(cell("better", tuned=(4.5, 3.5))),
    ]
    assert [s.spec for s in ranked(made)] == ["better", "good", "away", "unclear", "over", "failed"]


def test_the_best_plug_in_among_those_that_protect() -> None:
    made = ranked([stand(cell("away", tuned=(3.8, 3.1))), stand(cell("good", tuned=(4.5, 3.6)))])
    said = recommend(made, "50%", 4.0, 3.0)
    assert said.best is not None and said.best.spec == "good" and "only one that protects" in said.why


def test_where_none_protects_the_reader_is_warned() -> None:
    said = recommend([stand(cell("away", tuned=(3.8, 3.1)))], "50%", 4.0, 3.0)
    assert said.best is not None and "take care" in said.why and "0.200 nats better than the untuned" in said.why


def test_what_gains_nothing_is_not_taken() -> None:
    said = recommend([stand(cell("worse", tuned=(5.0, 4.2)))], "50%", 4.0, 3.0)
    assert said.best is None and "nothing is clearly gained" in said.why


def test_a_gain_within_the_noise_of_seeds_is_not_taken() -> None:
    """Plug-ins 3.8 and 4.1 of an untuned 4.0: a gain of 0.05, standard error 0.15."""
    found = stand(*(cell(seed=s, tuned=(5.0, 3.8 + 0.3 * s)) for s in (0, 1)), seeds=(0, 1))
    said = recommend([found], "50%", 4.0, 3.0)
    assert said.best is None and "nothing is clearly gained" in said.why and "nor does" not in said.why


def test_where_the_adapter_can_t_gain_that_is_told() -> None:
    reference = Reference.of([cell("uncompressed", role="uncompressed", tuned=(4.1, 4.1))])
    found = standing_of([cell("one", tuned=(5.0, 4.2))], reference, HALF)
    said = recommend([found], "50%", 4.0, 3.0)
    assert said.best is None and "nor does the same adapter on the uncompressed model" in said.why


def test_without_data_the_gradient_decides() -> None:
    """Only among emulators that are worse than the full model (3.0) on public text."""
    made = [
        cell("close", cosine=0.9, public_loss=3.0, tuned=None),
        cell("good", cosine=0.7, public_loss=3.5, tuned=None),
        cell("poor", cosine=0.2, public_loss=3.6, tuned=None),
    ]
    reference = Reference.of([cell("uncompressed", role="uncompressed", tuned=None)])
    standings = ranked(standing_of([c], reference, HALF) for c in made)
    said = recommend(standings, "50%", None, 3.0)
    assert said.best is not None and said.best.spec == "good" and "cosine 0.700" in said.why


@pytest.mark.parametrize(
    ("public_loss", "verdict"),
    [
        (3.5, "worse than the full model"),
        (3.01, "as good as the full model"),  # what rounding does is no protection
        (2.9, "as good as the full model"),
    ],
)
def test_verdicts_without_data(public_loss: float, verdict: str) -> None:
    reference = Reference.of([cell("uncompressed", role="uncompressed", tuned=None)])
    found = standing_of([cell(public_loss=public_loss, tuned=None)], reference, HALF)
    assert found.verdict == verdict and found.plug_in is None and found.of_adapter is None


def test_of_several_numbers() -> None:
    assert OverSeeds.of([2.0]) == OverSeeds(2.0, None, (2.0,))
    assert OverSeeds.of([1.0, 2.0, 3.0]).std == 1.0


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40%", Budget(share=0.4)),
        (0.25, Budget(share=0.25)),
        ("33.3%", Budget(share=0.333)),
        ("2KB", Budget(bytes=2000)),
    ],
)
def test_budgets(text: str | float, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["0", "1.5", "150%", "-3%", "much", "40", "0MB", "snan", "nan%", "inf"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)


def test_a_budget_larger_than_the_middle() -> None:
    assert Budget(share=0.3).bytes_of(1000) == 300
    with pytest.raises(ConfigError, match="leaves nothing to compress"):
        Budget(bytes=1000).bytes_of(1000)
