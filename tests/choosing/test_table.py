"""The table for people: it fits a narrow terminal, and says only what was measured."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.kinds import CLASSES
from offsite_fl.choosing.over_seeds import OverSeeds, points, rate
from offsite_fl.choosing.results import ScaleTried
from offsite_fl.choosing.settings import Settings
from offsite_fl.choosing.table import columns_of, reference_lines, rich_table, to_markdown
from tests.choosing.conftest import cell, references, right

LONG = "low-rank:keep=0.975,targets=q_proj/k_proj/v_proj/o_proj+quantize:bits=4,group=0"


def choice(*, tuned: bool = True, full: bool = True, scales: tuple[ScaleTried, ...] = ()) -> Choice:
    more = {} if tuned else {"tuned": None}
    cells = references((0, 1), full=2.0 if full else None)
    if not tuned:
        cells = [cell("uncompressed", s, role="uncompressed", tuned=None) for s in (0, 1)]
    specs = (LONG, "gradot:keep=0.5", "over:keep=0.5")
    cells += [cell(n, s, bytes=900 if n[0] == "o" else 500, scales=scales, **more) for n in specs for s in (0, 1)]  # type: ignore[arg-type]
    cells += [cell("away", s, tuned=(3.9, 3.5 + s / 10) if tuned else None) for s in (0, 1)]
    return Choice.of(cells, Settings(seeds=(0, 1)), out=Path())


def printed(shown: Choice, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(shown, width))
    return console.export_text()


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    for made in (choice(), choice(tuned=False)):
        said = printed(made, 80)
        assert "\N{HORIZONTAL ELLIPSIS}" not in said
        assert "too large" in said and ("gives away" in said) == made.tuned
        assert "".join(part for line in said.splitlines() for part in line[2:23].split()).count("group=0") == 1


def test_a_wide_one_has_deviations() -> None:
    assert "3.550 ± 0.071" in printed(choice(), 160)  # 3.5 and 3.6
    assert "±" not in printed(choice(), 80)


def test_a_roomy_one_has_everything() -> None:
    made = choice(scales=(ScaleTried(0.5, 3.0, 3.5),))
    head = " ".join(printed(made, 260).split())
    assert all(column.name in head for column in columns_of(made))
    assert "norm ratio" not in printed(made, 160)


def test_columns_say_only_what_was_measured() -> None:
    def names(made: Choice) -> set[str]:
        return {column.name for column in columns_of(made)}

    assert "recovered" in names(choice()) and "recovered" not in names(choice(full=False))
    assert "scale" not in names(choice())
    assert {"scale", "plug-in scaled"} <= names(choice(scales=(ScaleTried(0.5, 3.0, 3.5),)))
    assert names(choice(tuned=False)) == {
        "bytes",
        "verbatim",
        "FLOPs",
        "built in",
        "cosine",
        "norm ratio",
        "public loss",
    }


def test_numbers_for_people_by_hand() -> None:
    """Accuracies 75 % and 78 %: mean 76.5 %, sample deviation 3 / sqrt(2) = 2.12 points."""
    two = OverSeeds.of([0.75, 0.78])
    assert rate(two) == "76.5% ± 2.1" and points(two) == "76.5 ± 2.1"
    assert rate(OverSeeds.of([0.5])) == "50.0%" and points(OverSeeds.of([-0.034])) == "-3.4" and rate(None) == ""


def test_of_classes_the_plain_columns_are_accuracies_and_losses_have_their_name() -> None:
    cells = [*references(classes=True), cell("one", accuracy=right(0.5, 0.45, 0.8), without_repair=3.25)]
    made = Choice.of(cells, Settings(kind=CLASSES, repair=True), out=Path())
    (standing,) = made.standings
    texts = {column.name: column.text(standing) for column in columns_of(made)}
    assert texts["plug-in"] == "80.0%" and texts["gap"] == "35.0" and texts["of adapter"] == "75%"
    assert texts["plug-in, loss"] == "3.500" and texts["gap, loss"] == "1.000" and texts["recovered"] == "60%"
    (_, best), (_, full) = reference_lines(made)
    assert best["plug-in"] == "90.0%" and best["plug-in, loss"] == "3.000" and best["recovered"] == "80%"
    assert full["plug-in"] == "100.0%" and full["plug-in, loss"] == "2.000" and best["emulator zero-shot"] == "50.0%"
    assert {*best, *full} <= set(texts)
    assert "80.0%" in printed(made, 80) and "loss" not in printed(made, 80)


def test_markdown_is_a_table_of_equal_rows() -> None:
    lines = [line for line in to_markdown(choice()).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 + 2  # head and rule, candidates, references
    assert len({line.count("|") for line in lines}) == 1
    assert any(f"`{LONG}`" in line and "| 50% |" in line for line in lines)
