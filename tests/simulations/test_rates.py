"""Rates are chosen on examples that nobody tunes on and that are no test of a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import FiveRows, Row
from simulations import digits
from simulations.benchmarks import rates
from simulations.texts import CHOICES, choices_folder, kinds_folder


def write_lines(path: Path, count: int) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{path.stem} {number}\n" for number in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return lines


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def test_the_end_of_the_images_is_held_out(cache_dir: Path, tmp_path: Path) -> None:
    images = np.arange(1000, dtype=np.uint32).view(np.uint8).reshape(1000, 2, 2)  # image n says n
    digits.write_sides(images, np.repeat(np.arange(10, dtype=np.uint8), 100), cache_dir / digits.FOLDER)
    rates.held_out("images", tmp_path / "runs" / "data")
    was = pq.read_table(cache_dir / digits.FOLDER / "train.parquet").column("image").to_pylist()
    now = {side: pq.read_table(tmp_path / "runs" / "data" / f"{side}.parquet") for side in ("public", "train", "test")}
    assert [len(table) for table in now.values()] == [100, 0, 400]
    assert now["train"].column("image").to_pylist() + now["test"].column("image").to_pylist() == was
    assert Counter(now["test"].column("label").to_pylist()) == dict.fromkeys(digits.CLASSES, 40)


def test_the_end_of_the_texts_is_held_out(cache_dir: Path, tmp_path: Path) -> None:
    public, train = write_lines(kinds_folder() / "public.jsonl", 3), write_lines(kinds_folder() / "train.jsonl", 500)
    (tmp_path / "data.part").mkdir()  # an attempt that was interrupted
    rates.held_out("texts", tmp_path / "data")
    found = {path.name: lines_of(path) for path in (tmp_path / "data").iterdir()}
    assert found == {"public.jsonl": public, "train.jsonl": train[:100], "test.jsonl": train[100:]}
    assert not (tmp_path / "data.part").exists()


def test_each_owner_s_last_questions_are_held_out_by_turns(cache_dir: Path, tmp_path: Path) -> None:
    write_lines(choices_folder() / "public.txt", 2)
    asked = {owner: write_lines(choices_folder() / f"{owner}.jsonl", 70) for owner in CHOICES}
    rates.held_out("choices", tmp_path / "data")
    for owner, lines in asked.items():
        assert lines_of(tmp_path / "data" / f"{owner}.jsonl") == lines[:6]
    test = lines_of(tmp_path / "data" / "test.jsonl")
    assert test[:5] == [*(lines[6] for lines in asked.values()), asked["wisdom"][7]] and len(test) == 4 * 64


def test_runs_are_made_once_and_tabled(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(kinds_folder() / "public.jsonl", 3)
    write_lines(kinds_folder() / "train.jsonl", 500)
    made: list[dict[str, str]] = []

    def run(task: str, out: Path, keys: dict[str, str]) -> RunReport:
        made.append(keys)
        report = RunReport(FiveRows(*(Row(accuracy=a) for a in (0.1, 0.2, 0.3, 0.4, 0.5))))
        report.write(out, page=False)
        return report

    monkeypatch.setattr(rates, "classify", run)
    arguments = ["texts", "--lr", "1e-4", "--full-lr", "2e-5"]
    assert rates.main(arguments) == 0
    assert rates.main([*arguments, "--lr", "2e-4", "--full-lr", "3e-5"]) == 0
    data = str(tmp_path / "runs" / "rates-texts" / "data")
    assert made == [
        {"data.folder": data, "tune.lr": "1e-4", "baseline.lr": "2e-5"},
        {"data.folder": data, "tune.lr": "2e-4", "baseline.lr": "3e-5"},
    ]
    assert "| 1e-4 | 30.0 | 40.0 | 2e-5 | 50.0 |\n| 2e-4 | 30.0 | 40.0 | 3e-5 | 50.0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rates.main([*arguments, "--lr", "2e-4"])
    assert "2 times --lr, 1 times --full-lr" in capsys.readouterr().err
