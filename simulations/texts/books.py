"""The King James Bible as a small world of its own: public books to pre-train on, four kinds of others to adapt to.

What SmolLM2 is to Shakespeare, the small model of :mod:`simulations.pico` is to these: it has read much that is like
them, and never them. Shakespeare is too far from the Bible for it: there every gain is one of spelling, which the ends
of a model learn without its middle.
"""

from __future__ import annotations

import re
from pathlib import Path

from offsite_fl.config import cache_root
from simulations.texts.corpus import bible
from simulations.texts.owners import Share, write_files

_CHAPTER = re.compile(r"^((?:[123] )?[A-Z][A-Za-z ]+) [0-9]+$", re.MULTILINE)
# First book of each part, in the order of the Bible, and the one that is held out. Genesis to Esther are public.
_PARTS = {
    "wisdom": ("Job", "Ecclesiastes"),
    "prophets": ("Isaiah", "Ezekiel"),
    "gospels": ("Matthew", "John"),
    "letters": ("Romans", "Hebrews"),
}
BOOK_OWNERS: tuple[str, ...] = tuple(_PARTS)


def books() -> dict[str, str]:
    """The 66 books by name, in their order, each with its chapters' headings."""
    text = bible()
    found: dict[str, str] = {}
    starts = [*_CHAPTER.finditer(text)]
    for here, behind in zip(starts, [*(m.start() for m in starts[1:]), len(text)], strict=True):
        found[here[1]] = found.get(here[1], "") + text[here.start() : behind]
    return found


def public_books() -> str:
    """Genesis to Esther: the law and the histories."""
    every = books()
    names = list(every)
    return "".join(every[name] for name in names[: names.index(_PARTS["wisdom"][0])])


def book_partition() -> dict[str, Share]:
    """The four data owners' books: poetry and proverbs, prophets, gospels and Acts, letters and Revelation."""
    every = books()
    names = list(every)
    firsts = [names.index(first) for first, _ in _PARTS.values()]
    shares = {}
    for (owner, (_, held_out)), start, stop in zip(_PARTS.items(), firsts, [*firsts[1:], len(names)], strict=True):
        part = {name: every[name] for name in names[start:stop]}
        shares[owner] = Share({n: t for n, t in part.items() if n != held_out}, {held_out: part[held_out]})
    return shares


def books_folder() -> Path:
    """Where the quickstart app looks for these files: the corpus ``quickstart-bible``."""
    return cache_root() / "quickstart-bible"


def write_book_files(folder: str | Path) -> dict[str, Path]:
    """Write ``wisdom.jsonl`` ... ``letters.jsonl``, ``test.jsonl`` and ``public.txt``; return their paths."""
    return write_files(folder, book_partition(), public_books())
