"""The page: whole, safe whatever names hold, and true to the numbers."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from offsite_fl.comparing.cells import Arm
from offsite_fl.comparing.page import render_comparison, sentence, verdict
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.comparing.summary import Summary
from tests.comparing.conftest import FEDADAM, FEDAVG, grid_table, measured, whole_grid

HOSTILE = '<script>alert("x")</script>&\'$x$'


class Tags(HTMLParser):
    """All tags that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def page(settings: GridSettings, cells: list | None = None, name: str = "north") -> str:  # type: ignore[type-arg]
    held = {("iid", 2): {"client-0": {name: 10, "south": 3}, "client-1": {"south": 5}}}
    return render_comparison(Summary.of(settings, whole_grid() if cells is None else cells), held, {"torch": "2"})


def test_what_it_says(settings: GridSettings) -> None:
    text = page(settings)
    assert text.startswith("<!DOCTYPE html>") and "<code>fedavg</code>" in text
    assert "in 4 of 4 pairs" in text and "p = 0.12" in text  # 2 of 16, rounded
    assert "Who holds what" in text and "All conditions" in text and "How it was made" in text
    assert text.count("<svg") == 1 + 2 * 3  # holdings, and three curves a condition


def test_ids_of_pictures_are_unique(settings: GridSettings) -> None:
    ids = re.findall(r' id="([^"]+)"', page(settings))
    assert len(ids) == len(set(ids))


def test_hostile_names_are_text() -> None:
    table = grid_table()
    table["data"]["owners"] = [HOSTILE, "south"]
    table["model"]["path"] = HOSTILE
    settings = GridSettings.of(table)
    cells = [dataclasses.replace(m, error=HOSTILE) if i == 3 else m for i, m in enumerate(whole_grid())]
    text = page(settings, cells, HOSTILE)
    parser = Tags()
    parser.feed(text)
    assert "script" not in parser.seen and "&lt;script&gt;" in text


@pytest.mark.parametrize(("count", "said"), [(8, None), (10, "those of the best 8 of 10")])
def test_curves_that_are_left_out_are_counted(count: int, said: str | None) -> None:
    names = [f"fedadam:eta={number}" for number in range(1, count + 1)]
    settings = GridSettings.of(grid_table(strategies=names, partitions=["iid"], seeds=[0]))
    cells = [measured(Arm("strategy", name, "layer-drop:keep=2"), 3 + i / 10) for i, name in enumerate(names)]
    text = page(settings, cells)
    assert ("The curves are" in text) == (said is not None) and (said or "") in text


def test_nothing_measured_is_a_page_too(settings: GridSettings) -> None:
    assert "Nothing measured yet" in page(settings, [])


@pytest.mark.parametrize(("seeds", "word"), [([0], "too few pairs to tell"), ([0, 1, 2, 3], "clear")])
def test_the_verdict_knows_when_there_are_too_few_pairs(seeds: list[int], word: str) -> None:
    settings = GridSettings.of(grid_table(seeds=seeds, partitions=["iid", "natural"]))
    cells = [
        measured(arm, loss, partition=partition, seed=seed)
        for seed in seeds
        for partition in ("iid", "natural")
        for arm, loss in ((FEDAVG, 3.0), (FEDADAM, 3.1 + seed / 100))
    ]
    assert verdict(Summary.of(settings, cells).lead)[0] == word


def test_the_sentence_without_a_lead() -> None:
    assert sentence(None) == "No strategy has a result yet."
