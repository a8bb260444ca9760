"""Samples: what a report holds of them, and the strip that the page shows."""

from __future__ import annotations

import base64
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from offsite_fl.errors import DataError
from offsite_fl.evaluation.page import render_page
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS, FiveRows, Row
from offsite_fl.evaluation.samples import Sample

# The smallest PNG, one white pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsVkAXQAAAABJRU5ErkJggg=="
ROWS = FiveRows(*(Row(accuracy=a) for a in (0.5, 0.2, 0.4, 0.8, 0.9)))
ANSWERS = dict(zip(ROW_KEYS, ("3", "5", "3", "3", "3"), strict=True))
HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>'


class Cells(HTMLParser):
    """Rows of the tables of class ``samples`` as lists of texts, and every attribute of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.inside = "samples" in (dict(attrs).get("class") or "").split()
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "table"

    def handle_data(self, data: str) -> None:
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] = (self.rows[-1][-1] + " " + data.strip()).strip()


def test_a_report_with_samples_is_read_back(tmp_path: Path) -> None:
    given = [Sample("3", ANSWERS, image=PIXEL), Sample("law", {"plug_in": "wisdom"}, text="In the beginning")]
    folder = RunReport(ROWS, samples=given).write(tmp_path, page=False)
    assert RunReport.read(folder).samples == given
    assert RunReport.from_dict({k: v for k, v in RunReport(ROWS).to_dict().items() if k != "samples"}).samples == []


def test_pictures_stand_side_by_side_with_a_sign_at_each_answer() -> None:
    other = Sample("5", {**ANSWERS, "plug_in": "5"}, image=PIXEL)
    page = Cells(render_page(RunReport(ROWS, samples=[Sample("3", ANSWERS, image=PIXEL), other])))
    assert page.rows == [
        ["truth", "3", "5"],
        ["full zero-shot", "✓ 3", "✕ 3"],
        ["emulator zero-shot", "✕ 5", "✓ 5"],
        ["emulator tuned", "✓ 3", "✕ 3"],
        ["plug-in", "✓ 3", "✓ 5"],
        ["full fine-tuning", "✓ 3", "✕ 3"],
    ]
    said = [value for tag, name, value in page.attributes if (tag, name) == ("i", "aria-label")]
    assert said.count("right") == 6 and said.count("wrong") == 4
    assert [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")] == [
        f"data:image/png;base64,{PIXEL}"
    ] * 2


def test_texts_stand_below_each_other_and_rows_that_were_not_asked_are_left_out() -> None:
    shown = [Sample("law", {"full_zero_shot": "law", "plug_in": "wisdom"}, text="In the beginning"), Sample("letters")]
    page = Cells(render_page(RunReport(ROWS, samples=shown)))
    assert page.rows == [
        ["text", "truth", "full zero-shot", "plug-in"],
        ["In the beginning", "law", "✓ law", "✕ wisdom"],
        ["", "letters", "-", "-"],
    ]


def test_hostile_texts_are_shown_and_only_pictures_in_the_page_may_be() -> None:
    hostile = [Sample(HOSTILE, {"plug_in": HOSTILE}, image=PIXEL), Sample(HOSTILE, {"plug_in": HOSTILE}, text=HOSTILE)]
    text = render_page(RunReport(ROWS, samples=hostile))
    page = Cells(text)
    assert "<script" not in text and page.rows[0][1] == HOSTILE and page.rows[1][1] == f"✓ {HOSTILE}"
    assert {value.split(",")[0] for tag, name, value in page.attributes if name == "src"} == {"data:image/png;base64"}
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in text
    assert "img-src" not in render_page(RunReport(FiveRows(*(Row(math.log(p)) for p in (9, 8, 7, 6)))))


@pytest.mark.parametrize(
    "image",
    [
        "javascript:alert(1)",
        'not base64 "><script>',
        base64.b64encode(b"<svg onload='alert(1)'/>").decode(),
        "A" * (2**20 + 4),
    ],
    ids=["address", "quotes", "svg", "large"],
)
def test_what_is_no_small_png_is_refused(image: str) -> None:
    with pytest.raises(DataError, match="picture of a sample"):
        Sample("3", image=image)
    with pytest.raises(DataError, match=r"samples\[0\]: the picture of a sample"):
        RunReport.from_dict({**RunReport(ROWS).to_dict(), "samples": [{"truth": "3", "answers": {}, "image": image}]})


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(DataError, match="an answer of 'plugin'"):
        Sample("3", {"plugin": "3"})
