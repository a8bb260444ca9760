"""The page: well formed, closed in itself, escaped, and silent about what a run doesn't have."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from offsite_fl.evaluation.ledger import Ledger
from offsite_fl.evaluation.page import render_page
from offsite_fl.evaluation.plots import MANY, bytes_by_round, client_curves, inline, row_curve
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rounds import Dropped, RoundRecord
from offsite_fl.evaluation.rows import FiveRows, Row

ROWS = FiveRows(*(Row(math.log(p)) for p in (66.4, 386, 132, 55.9, 47.3)))
HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)> $\\frac{'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Reads a page strictly: every element closed in order, every id once, every reference to an id of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def federation(name: str = "comedies", reason: str = "not finite", rounds: int = 3, clients: int = 4) -> RunReport:
    names = [name, *(f"client {i}" for i in range(1, clients))]
    ledger, records = Ledger(), [RoundRecord(0, ROWS.full_zero_shot, ROWS.emulator_zero_shot)]
    for i in range(1, rounds + 1):
        for node in names:
            if i == 1:
                ledger.add(i, "bundle", "down", node, 200_000_000)
            ledger.add(i, "adapter", "down", node, 28_000_000)
            ledger.add(i, "update", "up", node, 28_000_000)
        reported = {node: {"train_loss": 4.0 + k / 10 - i / 20, "num_examples": 10} for k, node in enumerate(names)}
        records.append(RoundRecord(i, Row(4.2 - i / 20), Row(5.2 - i / 20), reported, seconds=3.0))
    records[-1].dropped.append(Dropped(name, reason))
    return RunReport(
        ROWS,
        ledger,
        records,
        config={"model": name, name: {"nested": reason}},
        versions={"python": "3.11", name: name},
        seeds={name: 1},
        seconds={name: 2.0, "evaluation": 100.0},
        emulator={"spec": name, "bytes": 10, "middle_bytes": 40, "full_bytes": 400, "bundle_bytes": {name: 100}},
        data={name: {"train_examples": 1234, reason: reason}},
        notes=[reason],
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(federation())


def test_the_page_is_well_formed(page: str) -> None:
    reader = Reader(page)
    assert reader.seen.count("svg") == 4 and reader.seen.count("h1") == 1
    assert len(reader.ids) == len(set(reader.ids))
    refers = [v[1:] for n, v in reader.attributes if n == "href"] + re.findall(r"url\(#([^)]+)\)", page)
    assert refers and set(refers) <= set(reader.ids)


def test_the_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(reader.seen)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "xlink:href") and (name != "href" or value.startswith("#"))
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_says_the_numbers(page: str) -> None:
    text = Reader(page).text
    assert "The plug-in model gains 51% of what full fine-tuning gains." in text
    assert "The tuned emulator is 99% worse than the untuned full model (perplexity 132 against 66.4)." in text
    for number in ("66.4", "386", "132", "55.9", "47.3", "0.859 nats"):
        assert number in text
    # ln(386 / 66.4) = 1.760, ln(66.4 / 55.9) = 0.172
    assert "\N{MINUS SIGN}1.76" in text and "+0.17" in text
    # 4 bundles of 200 MB, and 3 rounds of 4 adapters of 28 MB: 1.136 GB down.
    assert "800 MB" in text and "1.14\N{NO-BREAK SPACE}GB to the data owners" in text
    assert "25.0%" in text  # the emulator's share of the bytes it stands for: 10 / 40
    assert "1 dropped reply" in text and "1 min 40 s" in text and "1,234" in text


def test_bars_start_at_the_untuned_model(page: str) -> None:
    # From -1.760 to +0.339: the line lies at 1.760 / 2.099 = 83.84 %, the plug-in's bar is 0.172 / 2.099 = 8.20 % long.
    assert re.search(r"--at:83\.8[34]%", page)
    assert re.search(r"left:83\.8[34]%;width:8\.20%;background:var\(--plug\)", page)


def test_hostile_strings_are_text() -> None:
    page = render_page(federation(HOSTILE, HOSTILE, rounds=1, clients=2))
    reader = Reader(page)
    assert not {"script", "img"} & set(reader.seen)
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert reader.text.count(HOSTILE) >= 8
    assert "<script" not in page


def test_the_same_run_gives_the_same_page(page: str) -> None:
    assert render_page(federation()) == page


def test_what_a_run_has_not_is_left_out() -> None:
    page = render_page(RunReport(ROWS))
    text = Reader(page).text
    assert "The five rows" in text
    for heading in ("Round by round", "What left the house", "Data", "How it was made", "dropped"):
        assert f">{heading}" not in page
    assert "svg" not in Reader(page).seen
    assert not re.search(r"\bnan\b|None", text)


@pytest.mark.parametrize(
    "rows",
    [
        FiveRows(Row(4.0), Row(6.0), Row(math.inf), Row(math.nan)),
        FiveRows(*(Row(math.nan) for _ in range(5))),
        FiveRows(*(Row(4.0) for _ in range(5))),
        FiveRows(*(Row(accuracy=a) for a in (0.4, 0.3, 0.5, 0.6))),
        FiveRows(*(Row(loss) for loss in (800.0, 900.0, 850.0, 700.0, 600.0))),
    ],
    ids=["diverged", "all diverged", "all equal", "accuracy", "overflow"],
)
def test_odd_rows_still_make_a_page(rows: FiveRows) -> None:
    report = RunReport(rows, rounds=[RoundRecord(1, rows.plug_in, rows.emulator_tuned)])
    text = Reader(render_page(report)).text
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_odd_entries_of_an_edited_file_still_make_a_page() -> None:
    emulator = {"bundle_bytes": {"adapter": "many"}, "full_bytes": "x", "bytes": None, "seconds": True, "more": [1]}
    report = RunReport(ROWS, seconds={"all": math.nan}, emulator=emulator, data={"a": {"b": {"c": [1, None]}}})
    assert "more" in Reader(render_page(report)).text


def test_a_federation_in_accuracy() -> None:
    """Per cent and points, higher is better, and the data owners' loss isn't said to be per token of text."""
    shares = (0.37, 0.31, 0.348, 0.49, 0.53)
    rows = FiveRows(*(Row(accuracy=share) for share in shares))
    clients = {"wisdom": {"train_loss": 2.0}}
    rounds = [RoundRecord(i, Row(accuracy=0.37 + 0.06 * i), Row(accuracy=0.31), clients) for i in range(3)]
    read = Reader(render_page(RunReport(rows, rounds=rounds)))
    text = " ".join(read.text.split())
    assert "The plug-in model gains 75% of what full fine-tuning gains." in text
    assert "The tuned emulator is 2.2 points worse than the untuned full model (accuracy 34.8% against 37.0%)." in text
    for said in ("Plug-in accuracy", "49.0%", "14.2 points", "+12.0", "\N{MINUS SIGN}6.0", "training loss, nats"):
        assert said in text, said
    assert not re.search(
        r"perplexity|nats/token|nats per token", text.partition("How it was made")[0].partition("Adapter:")[0]
    )
    drawn = row_curve(rounds, rows, "plug_in")
    assert drawn is not None and "45%" in drawn.svg and ">accuracy<" in drawn.svg
    assert [mark.label for mark in drawn.legend] == ["plug-in", "full zero-shot", "full fine-tuning"]


def test_one_round_and_a_skipped_one() -> None:
    report = federation(rounds=1)
    report.rounds[1].skipped = True
    assert "Too few good replies, adapter unchanged: round 1." in Reader(render_page(report)).text


def test_many_clients_become_a_median() -> None:
    few, many = federation(clients=MANY), federation(clients=MANY + 1)
    drawn = client_curves(few.rounds)
    assert drawn is not None and [mark.label for mark in drawn.legend][:2] == ["comedies", "client 1"]
    drawn = client_curves(many.rounds)
    assert drawn is not None and [mark.label for mark in drawn.legend] == ["median", f"each of {MANY + 1} clients"]


def test_no_plot_of_nothing() -> None:
    assert row_curve([], ROWS, "plug_in") is None
    assert client_curves([RoundRecord(1, clients={"a": {"train_loss": math.nan}})]) is None
    assert bytes_by_round(Ledger()) is None


def test_colours_of_a_plot_follow_the_page() -> None:
    drawn = bytes_by_round(federation().ledger)
    assert drawn is not None and [mark.label for mark in drawn.legend] == ["bundle", "adapter", "update"]
    assert "var(--bundle,#" in drawn.svg and "font-family" not in drawn.svg and "<style" not in drawn.svg


def test_inline_keeps_only_the_ids_in_use() -> None:
    svg = '<?xml?>\n<svg width="1pt" viewBox="0 0 9 9"><g id="a"><path id="m"/><use xlink:href="#m"/></g></svg>'
    assert inline(svg, "x") == (
        '<svg viewBox="0 0 9 9" class="plot" aria-hidden="true"><g><path id="x-m"/><use href="#x-m"/></g></svg>'
    )


def test_matplotlib_is_loaded_for_the_page_only() -> None:
    code = "import sys, offsite_fl.evaluation.tables; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_write_makes_three_files(tmp_path: Path) -> None:
    RunReport(ROWS).write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.csv", "report.html", "report.json"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
