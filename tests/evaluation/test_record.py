"""Reports written, read back, and refused."""

import csv
import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from offsite_fl.errors import ConfigError, DataError
from offsite_fl.evaluation.ledger import Ledger, LedgerEntry
from offsite_fl.evaluation.record import RunReport, versions
from offsite_fl.evaluation.rounds import Dropped, RoundRecord
from offsite_fl.evaluation.rows import FiveRows, Row
from offsite_fl.evaluation.tables import print_report, summary


@pytest.fixture
def report() -> RunReport:
    rounds = [
        RoundRecord(0, Row(4.0), Row(6.0)),
        RoundRecord(1, Row(3.5), Row(5.0), {"a": {"train_loss": 4.25, "num_examples": 12}}, clipped=2, seconds=1.5),
        RoundRecord(2, dropped=[Dropped("17", "two values aren't finite")], skipped=True),
    ]
    return RunReport(
        rows=FiveRows(Row(4.0), Row(6.0), Row(5.0), Row(3.5), Row(3.0)),
        ledger=Ledger([LedgerEntry(1, "bundle", "down", "17", 2_000_000), LedgerEntry(1, "update", "up", "17", 500)]),
        rounds=rounds,
        config={"model": "pico", "tune": {"lr": 1e-4, "lora-targets": ["q_proj"]}, "resume": None, "fast": True},
        versions={"python": "3.11.0"},
        seeds={"run": 7},
        seconds={"federation": 12.5, "full fine-tuning": 2.5},
        emulator={"spec": "layer-drop:keep=2", "verbatim_share": 0.25, "bundle_bytes": {"adapter": 10, "emulator": 20}},
        data={"a": {"train_examples": 12, "source": "plays"}},
        notes=["a note"],
    )


def test_what_is_written_is_read_back(report: RunReport, tmp_path: Path) -> None:
    folder = report.write(tmp_path / "runs" / "demo", page=False)
    assert sorted(os.listdir(folder)) == ["report.csv", "report.json"]
    assert RunReport.read(folder) == report
    assert RunReport.read(folder / "report.json") == report


def test_report_json_has_the_promised_keys(report: RunReport, tmp_path: Path) -> None:
    found = json.loads((report.write(tmp_path, page=False) / "report.json").read_text())
    promised = {"rows", "gap", "recovered", "ledger", "rounds", "config", "versions", "seeds", "seconds"}
    assert promised <= set(found)
    assert found["gap"] == 1.5 and found["recovered"] == 0.5
    assert found["ledger"][0] == {"round": 1, "kind": "bundle", "direction": "down", "node": "17", "bytes": 2_000_000}
    assert found["rounds"][2] == {
        "round": 2,
        "plug_in": None,
        "emulator": None,
        "clients": {},
        "dropped": [{"node": "17", "reason": "two values aren't finite"}],
        "skipped": True,
        "clipped": 0,
        "seconds": None,
    }
    assert found["rounds"][1]["clients"] == {"a": {"train_loss": 4.25, "num_examples": 12}}


def test_csv_holds_the_rows_in_full_precision(report: RunReport, tmp_path: Path) -> None:
    lines = list(csv.DictReader((report.write(tmp_path, page=False) / "report.csv").read_text().splitlines()))
    assert [line["row"] for line in lines][3:] == ["plug_in", "full_fine_tuning"]
    assert float(lines[3]["perplexity"]) == math.exp(3.5) and lines[3]["accuracy"] == ""


def test_a_diverged_run_is_written_as_strict_json(report: RunReport, tmp_path: Path) -> None:
    report.rounds[1].clients["a"]["train_loss"] = math.nan
    report.rows = FiveRows(Row(4.0), Row(6.0), Row(math.inf), Row(3.5))
    text = (report.write(tmp_path, page=False) / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    again = RunReport.read(tmp_path)
    assert math.isnan(again.rounds[1].clients["a"]["train_loss"])
    assert again.gap is None and again.rows.full_fine_tuning is None


def test_a_failed_write_leaves_the_old_report_whole(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(tmp_path, page=False)
    before = (tmp_path / "report.json").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    report.notes.append("new")
    with pytest.raises(DataError, match="No space left"):
        report.write(tmp_path, page=False)
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report.csv", "report.json"]


def test_a_file_where_the_folder_should_be(report: RunReport, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        report.write(tmp_path / "taken")


def test_without_matplotlib_the_numbers_are_safe_first(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'offsite-fl\[report\]'"):
        report.write(tmp_path)
    assert RunReport.read(tmp_path) == report


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "isn't valid JSON"),
        ("[]", "report must be an object"),
        ('{"rows": {}}', "report lacks gap, recovered, ledger"),
        ('{"rows": NaN}', "NaN isn't JSON"),
        ("[" * 100_000, "isn't valid JSON"),
    ],
)
def test_files_that_hold_no_report(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        RunReport.read(tmp_path)
    assert "report.json" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", 2, "format 2"),
        ("rows", None, "rows must be an object"),
        ("rounds", [{"round": 1, "plug_in": {"loss": "x"}}], r"rounds\[0\].plug_in.loss must be a number"),
        ("rounds", [{"round": 1, "dropped": [{"node": "a"}]}], r"rounds\[0\].dropped\[0\] lacks reason"),
        ("rounds", [{"round": 1, "skipped": "no"}], "skipped must be true or false"),
        ("rounds", [{"round": 1, "clipped": -1}], "clipped must be a whole number"),
        ("rounds", [{"round": 1, "clients": {"a": {"train_loss": "x"}}}], r"clients.a.train_loss must be a number"),
        ("seeds", {"run": 1.5}, "seeds.run must be a whole number"),
        ("seconds", {"all": "long"}, "seconds.all must be a number"),
        ("versions", {"torch": 2}, "versions.torch must be a string"),
        ("notes", "a note", "notes must be a list"),
        ("data", {"a": 1}, "data.a must be an object"),
        ("ledgers", [], "unknown key 'ledgers'; did you mean 'ledger'"),
    ],
)
def test_malformed_entries_are_named(report: RunReport, key: str, value: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        RunReport.from_dict({**report.to_dict(), key: value})


def test_a_missing_report_and_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no report at"):
        RunReport.read(tmp_path)
    with pytest.raises(DataError, match="there is no report at"):
        RunReport.read(tmp_path / "nowhere")


def test_settings_that_are_no_json_are_named(report: RunReport) -> None:
    report.config = {"tune": {"path": Path("x")}}
    with pytest.raises(DataError, match=r"config\.tune\.path can't be written as JSON"):
        report.to_dict()


def test_versions_say_nothing_about_where_they_ran() -> None:
    found = versions()
    assert set(found) >= {
        "python",
        "offsite-fl",
        "torch",
        "transformers",
        "flwr",
        "peft",
        "safetensors",
        "cpus",
        "cuda",
    }
    assert found["cuda"].startswith(("yes", "no")) and int(found["cpus"]) >= 1
    assert not any(os.sep in value or os.uname().nodename in value for value in found.values())


def test_the_terminal_shows_rows_bytes_and_drops(report: RunReport) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    report.rounds[2].dropped.append(Dropped("[red]18[/red]", "[/nonsense]"))
    print_report(report, console)
    text = console.export_text()
    assert "33.1" in text and "+0.5000 nats" in text and "recovered 50.0%" in text
    assert "2.00 MB" in text and "500 B" in text
    assert "round 2: dropped 17: two values aren't finite" in text
    assert "dropped [red]18[/red]: [/nonsense]" in text
    assert "note: a note" in text


def test_the_summary_for_machines(report: RunReport) -> None:
    found = summary(report)
    assert json.loads(json.dumps(found)) == found
    assert found["bytes"] == {"down": {"bundle": 2_000_000}, "up": {"update": 500}}
    assert (found["rounds"], found["dropped"], found["seconds"]) == (2, 1, 15.0)
    assert found["verdict"]["protected"] is True


def test_a_table_without_the_fifth_row_and_in_accuracy() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(RunReport(FiveRows(*(Row(accuracy=a) for a in (0.5, 0.3, 0.4, 0.6)))), console)
    text = console.export_text()
    assert "not run" in text and "+10.0 points" in text and "gap +20.0 points" in text and "recovered -" in text
