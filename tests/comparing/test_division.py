"""Clients' files and who holds what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offsite_fl.comparing.division import divide, mixture, read_holdings, read_rows
from offsite_fl.comparing.settings import DataPart
from offsite_fl.errors import DataError


@pytest.fixture
def data(tmp_path: Path) -> DataPart:
    for owner, size in (("north", 3), ("south", 5)):
        lines = [json.dumps({"text": f"{owner} {i} \N{SNOWMAN}"}) for i in range(size)]
        (tmp_path / f"{owner}.jsonl").write_text("\n".join([*lines, json.dumps({"text": "  "})]) + "\n")
    return DataPart(("north", "south"), folder=str(tmp_path))


def test_files_hold_every_text_once_and_holdings_count_them(data: DataPart, tmp_path: Path) -> None:
    rows = read_rows(data)
    assert rows["owner"] == ["north"] * 3 + ["south"] * 5  # empty texts are no rows
    divide(rows, "iid", 2, 0, tmp_path / "out", "digest")
    lines = [json.loads(line) for i in (0, 1) for line in (tmp_path / f"out/client-{i}.jsonl").open(encoding="utf-8")]
    assert sorted(line["text"] for line in lines) == sorted(rows["text"])
    held = read_holdings(tmp_path / "out")
    assert sum(sum(own.values()) for own in held.values()) == sum(len(text) for text in rows["text"])


def test_what_is_there_is_kept_unless_the_rows_changed(data: DataPart, tmp_path: Path) -> None:
    rows, out = read_rows(data), tmp_path / "out"
    divide(rows, "natural", 2, 0, out, "one")
    (out / "client-0.jsonl").write_text("touched")
    divide(rows, "natural", 2, 0, out, "one")
    assert (out / "client-0.jsonl").read_text() == "touched"
    divide(rows, "natural", 2, 0, out, "other")
    assert (out / "client-0.jsonl").read_text() != "touched"


def test_a_mixture_weighs_by_what_is_held() -> None:
    assert mixture({"a": 30, "b": 10}, {"a": 2.0, "b": 4.0}) == pytest.approx((30 * 2 + 10 * 4) / 40)


def test_files_without_text(tmp_path: Path) -> None:
    (tmp_path / "north.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(DataError, match="'text'"):
        read_rows(DataPart(("north",), folder=str(tmp_path)))
