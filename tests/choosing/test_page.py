"""choose.html: well formed, closed in itself, and with every candidate in it."""

from __future__ import annotations

import re

import pytest

from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.frontier import frontier
from offsite_fl.choosing.kinds import CLASSES
from offsite_fl.choosing.page import render_choice
from offsite_fl.choosing.settings import Settings
from tests.choosing.conftest import cell, references, right
from tests.evaluation.test_page import Reader

SEEDS = (0, 1)


def made(tuned: bool) -> Choice:
    """One of each verdict, one with an awful plug-in, one that diverged, one that failed."""
    losses = {
        "c-protects": (4.5, 3.5),
        "c-away": (3.9, 3.4),
        "c-unclear": (3.5, 3.5),
        "c-awful": (20.0, 30.0),
        "c-diverged": (5.0, float("nan")),
        "c-over": (4.6, 3.6),
    }
    cells = references(SEEDS) if tuned else [cell("uncompressed", s, role="uncompressed", tuned=None) for s in SEEDS]
    for name, pair in losses.items():
        size = 900 if name == "c-over" else 500
        cells += [cell(name, s, bytes=size, tuned=pair if tuned else None, cosine=0.08 * len(name)) for s in SEEDS]
    cells += [cell("c-broken", s, error="it has no <b>linear</b>") for s in SEEDS]
    return Choice.of(
        cells, Settings(seeds=SEEDS), about={"model": "a model", "data": "x.jsonl"}, versions={"torch": "2"}
    )


@pytest.mark.parametrize("tuned", [True, False])
def test_the_page_is_well_formed_and_has_all(tuned: bool) -> None:
    choice = made(tuned)
    page = render_choice(choice)
    reader = Reader(page)
    assert reader.seen.count("svg") == 1 and reader.seen.count("h1") == 1
    assert len(reader.ids) == len(set(reader.ids))
    for standing in choice.standings:
        assert standing.spec in reader.text and standing.verdict in reader.text
    assert choice.why in reader.text and "it has no <b>linear</b>" in reader.text
    assert "x.jsonl" in reader.text and "uncompressed" in reader.text


@pytest.mark.parametrize("tuned", [True, False])
def test_the_page_fetches_nothing_and_runs_nothing(tuned: bool) -> None:
    page = render_choice(made(tuned))
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(reader.seen)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "xlink:href") and (name != "href" or value.startswith("#"))
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page


def test_classes_are_drawn_and_told_in_accuracy_and_loss() -> None:
    """One that protects by both, and one whose emulator is calmer and yet less often right than the plug-in."""
    numbers = {"c-both": ((4.5, 3.5), right(0.5, 0.45, 0.8)), "c-calm": ((3.0, 3.5), right(0.5, 0.4, 0.7))}
    cells = references(SEEDS, classes=True)
    cells += [
        cell(name, s, tuned=losses, accuracy=shares, without_repair=3.25)
        for name, (losses, shares) in numbers.items()
        for s in SEEDS
    ]
    choice = Choice.of(cells, Settings(seeds=SEEDS, kind=CLASSES, repair=True))
    page = render_choice(choice)
    reader = Reader(page)
    assert reader.seen.count("svg") == 2 and len(reader.ids) == len(set(reader.ids))
    assert [s.verdict for s in choice.standings] == ["protects", "protects"] and choice.best is choice.standings[0]
    for said in ("The frontier in accuracy", "The frontier in loss", "80.0%", "35.0", "plug-in, loss", "3.500"):
        assert said in reader.text, said
    assert "90.0% on the uncompressed model" in reader.text.replace(" ± 0.0", "") and "per token" not in reader.text
    assert "public text" not in reader.text and "nearest" in reader.text


def test_every_candidate_with_numbers_is_a_numbered_dot() -> None:
    choice = made(True)
    plot = frontier(choice)
    assert plot is not None
    drawn = {int(number) for number in re.findall(r"<text[^>]*>\s*(\d+)\s*</text>", plot.svg)}
    expected = {i for i, s in enumerate(choice.standings, start=1) if s.spec not in ("c-diverged", "c-broken")}
    assert len(expected) == 5 and expected <= drawn
    assert not any(standing.spec in plot.svg for standing in choice.standings)


def test_nothing_to_draw() -> None:
    cells = [*references(), cell("broken", error="x")]
    choice = Choice.of(cells, Settings())
    assert frontier(choice) is None and "<svg" not in render_choice(choice)
    assert "No emulator to take." in render_choice(choice)
