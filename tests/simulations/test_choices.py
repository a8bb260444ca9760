"""Questions about verses: each checked against the Bible itself, read here in another way."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from offsite_fl.data.choices import read_questions
from simulations.texts import CHOICES, bible, write_choice_files
from simulations.texts.choices import PROMPT, TESTED, TUNED

END = PROMPT.partition("{verse}")[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_choice_files(tmp_path_factory.mktemp("choices"))


@pytest.fixture(scope="module")
def places() -> dict[str, list[tuple[str, int]]]:
    """Verse to where it stands: book and chapter, from the headings one line after the other."""
    found: dict[str, list[tuple[str, int]]] = {}
    here = ("", 0)
    for line in bible().splitlines():
        if heading := re.fullmatch(r"((?:[123] )?[A-Z][A-Za-z ]+) ([0-9]+)", line):
            here = (heading[1], int(heading[2]))
        elif line:
            found.setdefault(line, []).append(here)
    return found


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_files_hold_questions(files: dict[str, Path]) -> None:
    assert set(files) == {*CHOICES, "test", "public"}
    for owner, names in CHOICES.items():
        asked = read_questions(files[owner])
        assert {q.choices for q in asked} == {names}
        assert Counter(q.right for q in asked) == dict.fromkeys(names, TUNED)  # every book is right equally often
    test = read_questions(files["test"])
    assert Counter(q.right for q in test) == {name: TESTED for names in CHOICES.values() for name in names}
    first = [q.right for q in test[:16]]
    assert len(set(first)) == 16  # the first n lines are a fair sample
    assert files["public"].read_text().startswith("Genesis 1\n")


def test_answers_are_right_and_stand_nowhere_else(
    files: dict[str, Path], places: dict[str, list[tuple[str, int]]]
) -> None:
    for name in (*CHOICES, "test"):
        for question, row in zip(read_questions(files[name]), rows(files[name]), strict=True):
            verse = question.prompt.removesuffix(END)
            assert question.prompt == verse + END
            ((book, _),) = places[verse]
            assert book.removeprefix("1 ").removeprefix("2 ") == question.right
            assert CHOICES[str(row["owner"])] == question.choices
            asked = re.findall(r"[a-z]+", verse.lower())
            assert not {name.lower() for name in question.choices} & set(asked)


def test_no_chapter_is_on_two_sides(files: dict[str, Path], places: dict[str, list[tuple[str, int]]]) -> None:
    chapters: dict[str, set[tuple[str, int]]] = {}
    verses: Counter[str] = Counter()
    for name in (*CHOICES, "test"):
        found = [question.prompt.removesuffix(END) for question in read_questions(files[name])]
        verses.update(found)
        chapters[name] = {places[verse][0] for verse in found}
    assert set(verses.values()) == {1}
    for name in CHOICES:
        assert chapters[name].isdisjoint(chapters["test"])
        assert all(chapters[name].isdisjoint(chapters[other]) for other in CHOICES if other != name)
    assert {number % 5 for _, number in chapters["test"]} == {0}
    public = files["public"].read_text(encoding="utf-8")
    assert not any(verse in public for verse in verses)


def test_written_twice_they_are_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    again = write_choice_files(tmp_path)
    assert {name: path.read_bytes() for name, path in again.items()} == {n: p.read_bytes() for n, p in files.items()}
