"""The tables for people, spreadsheets and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest
from rich.console import Console

from offsite_fl.comparing.settings import GridSettings
from offsite_fl.comparing.summary import Summary
from offsite_fl.comparing.table import latex, rich_tables, to_csv, to_latex
from tests.comparing.conftest import FEDADAM, grid_table, measured, whole_grid


def test_csv_has_every_number(settings: GridSettings) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(Summary.of(settings, whole_grid())))))
    assert len(lines) == 2 * 4  # two partitions, two strategies and two references
    line = next(line for line in lines if line["strategy"] == "fedavg" and line["partition"] == "iid")
    assert float(line["plug_in"]) == 3.0 and float(line["plug_in_std"]) == 0.0
    assert float(line["recovered"]) == 0.5 and line["seeds"] == "0/1" and line["errors"] == ""
    assert [line["role"] for line in lines[:2]] == ["full-fine-tuning", "strategy"]  # best first


def test_failed_cells_are_in_the_table(settings: GridSettings) -> None:
    cells = [m for m in whole_grid() if m.cell.arm != FEDADAM]
    cells += [measured(FEDADAM, None, partition="iid", seed=seed, error="a, b; c") for seed in (0, 1)]
    line = next(line for line in csv.DictReader(io.StringIO(to_csv(Summary.of(settings, cells)))) if line["errors"])
    assert line["plug_in"] == "" and line["errors"] == "a, b; c; a, b; c"


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("a_b", r"a\_b"),
        ("50% & 3$", r"50\% \& 3\$"),
        ("{#}", r"\{\#\}"),
        ("\\input{x}", r"\textbackslash{}input\{x\}"),
        ("a^b~c", r"a\textasciicircum{}b\textasciitilde{}c"),
        ("1 ± 2", r"1 $\pm$ 2"),
    ],
)
def test_latex_escaping(text: str, done: str) -> None:
    assert latex(text) == done


def test_latex_is_one_tabular_with_as_many_cells_in_each_row(settings: GridSettings) -> None:
    text = to_latex(Summary.of(settings, whole_grid()))
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len({line.count(" & ") for line in rows}) == 1 and len(rows) == 1 + 8
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert r"\textbf{fedavg}" in text and r"\textbf{fedadam" not in text


def test_the_terminal_shows_names_as_they_are(settings: GridSettings) -> None:
    cells = [dataclasses.replace(m) for m in whole_grid()]
    console = Console(width=160, file=io.StringIO(), record=True)
    for table in rich_tables(Summary.of(settings, cells)):
        console.print(table)
    said = console.export_text()
    assert "fedadam:eta=0.01" in said and "untuned full model" in said and "natural" in said


def test_conditions_are_named_by_what_differs() -> None:
    summary = Summary.of(GridSettings.of(grid_table(fractions=[0.5, 1.0])), [])
    titles = [str(table.title) for table in rich_tables(summary)]
    assert titles[0] == "iid, 50% of clients a round" and len(titles) == 4
