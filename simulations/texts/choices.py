"""Multiple choice from the King James Bible: which of four books is this verse from?

Four data owners have one kind of book each and ask about the four large ones of their kind, so that they aren't
identically distributed: other texts and other answers with each. Every book is right equally often, so guessing gets a
quarter, and knowing which books there are gets no more.

Every fifth chapter is the test, all others are tuned on. A verse that stands in the Bible twice is on no side, and
neither is one that names a book which is asked about: the answer shouldn't be read off.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from offsite_fl.config import cache_root
from simulations.texts.books import books, public_books
from simulations.texts.owners import write_text

CHOICES: dict[str, tuple[str, ...]] = {
    "wisdom": ("Job", "Psalms", "Proverbs", "Ecclesiastes"),
    "prophets": ("Isaiah", "Jeremiah", "Ezekiel", "Daniel"),
    "gospels": ("Matthew", "Luke", "John", "Acts"),
    "letters": ("Romans", "Corinthians", "Hebrews", "Revelation"),
}
"""What each owner asks about; the two letters to the Corinthians are one answer."""
PROMPT = "{verse}\nThis verse is from the book of"
TUNED, TESTED = 120, 25  # questions of each book
_CYCLE = 5  # of so many chapters of a book one is the test
_LENGTH = range(80, 241)  # characters of a verse that says enough and costs little
_SEED = 0


def choices_folder() -> Path:
    """Where the quickstart app looks for these files: the corpus ``quickstart-choices``."""
    return cache_root() / "quickstart-choices"


def questions() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Side ("train", "test") to owner to questions, drawn by a fixed seed; those of an owner's books take turns."""
    verses = _verses()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"train": {}, "test": {}}
    for owner, names in CHOICES.items():
        for side, count in (("train", TUNED), ("test", TESTED)):
            turns = zip(*(_drawn(verses[name][side], count, f"{side} {name}") for name in names), strict=True)
            found[side][owner] = [
                _question(owner, name, verse) for turn in turns for name, verse in zip(names, turn, strict=True)
            ]
    return found


def write_choice_files(folder: str | Path) -> dict[str, Path]:
    """Write ``wisdom.jsonl`` ... ``letters.jsonl`` (to tune on), ``test.jsonl`` and ``public.txt``; return their paths.

    A line of a ``.jsonl`` file has ``prompt``, ``choices``, ``answer`` (an index) and ``owner``. The lines of
    ``test.jsonl`` take turns between the owners. The public text is the Bible's law and histories, plain.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = questions()
    written = {owner: _write(folder / f"{owner}.jsonl", rows) for owner, rows in found["train"].items()}
    turns = zip_longest(*found["test"].values())
    written["test"] = _write(folder / "test.jsonl", [row for turn in turns for row in turn if row])
    written["public"] = write_text(folder / "public.txt", public_books())
    return written


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _question(owner: str, name: str, verse: str) -> dict[str, Any]:
    names = CHOICES[owner]
    return {"prompt": PROMPT.format(verse=verse), "choices": list(names), "answer": names.index(name), "owner": owner}


def _drawn(verses: list[str], count: int, name: str) -> list[str]:
    """``count`` of the verses, by a seed that is the same on every machine."""
    return random.Random(f"{_SEED} {name}").sample(verses, count)


def _verses() -> dict[str, dict[str, list[str]]]:
    """Book to side to its verses that may be asked about."""
    every = books()
    times = Counter(line for text in every.values() for line in text.splitlines())
    named = re.compile(r"\b(" + "|".join(name for names in CHOICES.values() for name in names) + r")\b", re.IGNORECASE)
    found: dict[str, dict[str, list[str]]] = {
        name: {"train": [], "test": []} for names in CHOICES.values() for name in names
    }
    for book, text in every.items():
        name = re.sub(r"^[12] ", "", book)
        if book not in found and name != "Corinthians":
            continue
        for number, chapter in enumerate(_chapters(text)):
            side = "test" if number % _CYCLE == _CYCLE - 1 else "train"
            fit = (v for v in chapter if len(v) in _LENGTH and times[v] == 1 and not named.search(v))
            found[name][side] += fit
    return found


def _chapters(text: str) -> Iterator[list[str]]:
    """The verses of each chapter: headings and chapters take turns, with an empty line between them."""
    for part in text.strip().split("\n\n")[1::2]:
        yield part.split("\n")
