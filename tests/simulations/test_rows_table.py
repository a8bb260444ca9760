"""The table of several runs' rows, with means and deviations by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import FiveRows, Row
from simulations.benchmarks.rows import main, summary


def report(seed: int, *accuracies: float) -> RunReport:
    return RunReport(FiveRows(*(Row(accuracy=a, f1=a / 2) for a in accuracies)), seeds={"run": seed})


def test_means_and_deviations() -> None:
    runs = [report(1, 0.5, 0.2, 0.3, 0.8, 0.9), report(2, 0.5, 0.1, 0.4, 0.7, 0.9)]
    # Recovered: 0.3 / 0.4 = 75 % and 0.2 / 0.4 = 50 %; deviation of 75 and 50 is 25 / sqrt(2) = 17.7.
    assert summary(runs).splitlines() == [
        "| accuracy, % | seed 1 | seed 2 | mean ± sd |",
        "|---|---|---|---|",
        "| full zero-shot | 50.0 | 50.0 | 50.0 ± 0.0 |",
        "| emulator zero-shot | 20.0 | 10.0 | 15.0 ± 7.1 |",
        "| emulator tuned | 30.0 | 40.0 | 35.0 ± 7.1 |",
        "| plug-in | 80.0 | 70.0 | 75.0 ± 7.1 |",
        "| full fine-tuning | 90.0 | 90.0 | 90.0 ± 0.0 |",
        "| recovered, % | 75.0 | 50.0 | 62.5 ± 17.7 |",
        "",
        "| f1, % | seed 1 | seed 2 | mean ± sd |",
        "|---|---|---|---|",
        "| full zero-shot | 25.0 | 25.0 | 25.0 ± 0.0 |",
        "| emulator zero-shot | 10.0 | 5.0 | 7.5 ± 3.5 |",
        "| emulator tuned | 15.0 | 20.0 | 17.5 ± 3.5 |",
        "| plug-in | 40.0 | 35.0 | 37.5 ± 3.5 |",
        "| full fine-tuning | 45.0 | 45.0 | 45.0 ± 0.0 |",
    ]


def test_what_was_not_run_is_a_dash() -> None:
    lines = summary([report(1, 0.5, 0.2, 0.3, 0.8)]).splitlines()
    assert lines[6:8] == ["| full fine-tuning | - | - |", "| recovered, % | - | - |"]


def test_losses_are_shown_as_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunReport(FiveRows(*(Row(0.0) for _ in range(4))), seeds={"run": 3}).write(tmp_path, page=False)
    assert main([str(folder)]) == 0
    assert (
        "| perplexity | seed 3 | mean ± sd |\n|---|---|---|\n| full zero-shot | 1.0 | 1.0 |" in capsys.readouterr().out
    )
    assert main([str(tmp_path / "none")]) == 1
