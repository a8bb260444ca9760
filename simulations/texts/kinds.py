"""Passages of the King James Bible with the kind of book that each is from: a task for a text classifier.

No chapter is on two sides: of each kind's chapters some are public, with the model owner, some are the test, and the
others are with the data owners.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

from offsite_fl.config import cache_root
from offsite_fl.errors import DataError
from simulations.texts.books import books
from simulations.texts.owners import write_text

# First book of each kind, in the order of the Bible.
_FIRST = {
    "law": "Genesis",
    "history": "Joshua",
    "wisdom": "Job",
    "prophets": "Isaiah",
    "gospels": "Matthew",
    "letters": "Romans",
}
KINDS: tuple[str, ...] = tuple(_FIRST)
VERSES = 2  # of a passage
# Of ten chapters of a kind in their order: the first is public, the second is test, eight are tuned on.
_CYCLE = 10
_SIDES = {0: "public", 1: "test"}
# Passages of each kind on each side; the rarest kind has that many, so all classes are of one size.
SIZES = {"public": 30, "test": 80, "train": 600}


def kinds_folder() -> Path:
    """Where the classifying app looks for these files: the corpus ``kinds``."""
    return cache_root() / "kinds"


def labelled_passages() -> dict[str, dict[str, list[str]]]:
    """Side ("public", "test", "train") to kind to passages of :data:`VERSES` verses, evenly spread over the books."""
    found: dict[str, dict[str, list[str]]] = {side: {kind: [] for kind in KINDS} for side in SIZES}
    for kind, chapters in _chapters().items():
        for number, chapter in enumerate(chapters):
            side = _SIDES.get(number % _CYCLE, "train")
            found[side][kind] += [" ".join(chapter[i : i + VERSES]) for i in range(0, len(chapter) - 1, VERSES)]
    return {side: {kind: _spread(every, SIZES[side]) for kind, every in of.items()} for side, of in found.items()}


def write_kind_files(folder: str | Path) -> dict[str, Path]:
    """Write ``public.jsonl``, ``test.jsonl`` and ``train.jsonl``; return their paths by side.

    A line has ``text`` and ``label``. The kinds take turns, so that the first n lines are a fair sample.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for side, of in labelled_passages().items():
        turns = zip_longest(*([{"text": text, "label": kind} for text in texts] for kind, texts in of.items()))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for turn in turns for row in turn if row)
        written[side] = write_text(folder / f"{side}.jsonl", lines)
    return written


def _chapters() -> dict[str, list[list[str]]]:
    """Kind to its chapters, each as its verses, in the order of the Bible."""
    every = books()
    names = list(every)
    firsts = [names.index(first) for first in _FIRST.values()]
    found = {}
    for kind, start, stop in zip(KINDS, firsts, [*firsts[1:], len(names)], strict=True):
        # Headings and the verses of their chapters, one a line, take turns; empty lines are between them.
        parts = [part for name in names[start:stop] for part in every[name].strip().split("\n\n")[1::2]]
        found[kind] = [part.split("\n") for part in parts]
    return found


def _spread(items: list[str], count: int) -> list[str]:
    """``count`` of the items, evenly spaced, in their order."""
    if len(items) < count:
        raise DataError(f"{len(items)} passages can't be thinned to {count}")
    return [items[number * len(items) // count] for number in range(count)]
