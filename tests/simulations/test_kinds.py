"""Passages by kind of book, from the texts in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offsite_fl.errors import DataError
from simulations.texts import KINDS, books, labelled_passages, write_kind_files
from simulations.texts.kinds import _chapters, _spread


def test_chapters_lose_nothing() -> None:
    chapters = _chapters()
    assert sum(map(len, chapters.values())) == 1189  # of the King James Bible
    assert sum(len(chapter) for of in chapters.values() for chapter in of) == 31102  # its verses
    assert chapters["law"][0][0].startswith("In the beginning God created")
    assert chapters["letters"][-1][-1].endswith("be with you all. Amen.")
    assert chapters["wisdom"][0][0] in books()["Job"]


def test_no_verse_is_on_two_sides_and_classes_are_of_one_size() -> None:
    found = labelled_passages()
    sizes = {side: {kind: len(texts) for kind, texts in of.items()} for side, of in found.items()}
    assert sizes == {
        "public": dict.fromkeys(KINDS, 30),
        "test": dict.fromkeys(KINDS, 80),
        "train": dict.fromkeys(KINDS, 600),
    }
    # The n-th chapter of a kind, of ten in turn: the first is public, the second is test; pairs of verses in order.
    for kind, chapters in _chapters().items():
        allowed: dict[str, set[str]] = {"public": set(), "test": set(), "train": set()}
        for number, chapter in enumerate(chapters):
            side = {0: "public", 1: "test"}.get(number % 10, "train")
            allowed[side] |= {f"{one} {other}" for one, other in zip(chapter[::2], chapter[1::2], strict=False)}
        for side, of in found.items():
            assert set(of[kind]) <= allowed[side]


def test_files_take_turns(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_kind_files(tmp_path)["test"].read_text(encoding="utf-8").splitlines()]
    assert [row["label"] for row in rows[:7]] == [*KINDS, "law"] and len(rows) == 480


def test_spread_is_even_and_says_when_there_is_too_little() -> None:
    assert _spread(list("abcdef"), 3) == ["a", "c", "e"]
    with pytest.raises(DataError, match="2 passages can't be thinned to 3"):
        _spread(["a", "b"], 3)
