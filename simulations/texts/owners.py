"""Who owns what: four data owners with one genre each (so not identically distributed), and held-out text of each.

Held-out text is other works of the same genres, never a part of a work that is tuned on. The poems are too few for
that: there a run of sonnets and one of the longer poems is held out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from offsite_fl.config import cache_root
from simulations.texts.corpus import bible, shakespeare, sonnets

# Genres as in the First Folio; Pericles, which isn't in it, goes with the comedies, Cymbeline with the tragedies.
_COMEDIES = (
    "alls_well_that_ends_well as_you_like_it comedy_of_errors loves_labours_lost measure_for_measure "
    "merchant_of_venice merry_wives_of_windsor midsummer_nights_dream pericles taming_of_the_shrew tempest "
    "two_gentlemen_of_verona winters_tale"
)
_HISTORIES = (
    "henry_iv_part_1 henry_iv_part_2 henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john richard_iii"
)
_TRAGEDIES = (
    "antony_and_cleopatra coriolanus cymbeline hamlet lear othello romeo_and_juliet timon_of_athens "
    "tragedy_of_titus_andronicus troilus_and_cressida"
)
# Sonnets 138 and 144 are printed in The Passionate Pilgrim too, so they stay on its side.
_HELD_OUT_SONNETS = range(97, 127)
_WORKS = {
    "comedies": (_COMEDIES, "much_ado_about_nothing twelfth_night"),
    "histories": (_HISTORIES, "henry_v richard_ii"),
    "tragedies": (_TRAGEDIES, "julius_caesar macbeth"),
    "poems": ("passionate_pilgrim phoenix_and_the_turtle rape_of_lucrece sonnets", "lovers_complaint sonnets"),
}
OWNERS: tuple[str, ...] = tuple(_WORKS)


@dataclass(frozen=True)
class Share:
    """What one data owner has: works to tune on, and works held out to test with, by title."""

    train: dict[str, str]
    test: dict[str, str]


def partition() -> dict[str, Share]:
    """The four data owners' works. No work is with two owners, none on both sides."""
    works = shakespeare()
    numbered = dict(enumerate(sonnets(works["sonnets"]), start=1))

    def take(names: str, held_out: bool) -> dict[str, str]:
        found = {}
        for name in names.split():
            if name == "sonnets":
                kept = [poem for number, poem in numbered.items() if (number in _HELD_OUT_SONNETS) == held_out]
                found[name] = "\n".join(kept)
            else:
                found[name] = works[name]
        return found

    return {owner: Share(take(train, False), take(test, True)) for owner, (train, test) in _WORKS.items()}


def passages(text: str, size: int = 2000) -> list[str]:
    """Cut at empty lines into passages of about ``size`` characters (a speech that is longer stays whole)."""
    found: list[str] = []
    for part in text.strip().split("\n\n"):
        if found and len(found[-1]) + len(part) < size:
            found[-1] += "\n\n" + part
        else:
            found.append(part)
    return [passage + "\n" for passage in found]


def quickstart_folder() -> Path:
    """Where the quickstart app looks for the data owners' files unless its run config names a folder."""
    return cache_root() / "quickstart"


def write_owner_files(folder: str | Path) -> dict[str, Path]:
    """Write ``comedies.jsonl`` ... ``poems.jsonl`` (to tune on), ``test.jsonl`` and ``public.txt``; return their paths.

    A line of a ``.jsonl`` file has ``text``, ``title`` and ``owner``. The lines of ``test.jsonl`` take turns between
    the owners, so that the first n of them are a fair sample.
    """
    return write_files(folder, partition(), bible())


def write_files(folder: str | Path, shares: Mapping[str, Share], public: str) -> dict[str, Path]:
    """The files of :func:`write_owner_files` for any shares and public text."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        owner: write_text(folder / f"{owner}.jsonl", _lines(_rows(owner, share.train)))
        for owner, share in shares.items()
    }
    turns = zip_longest(*(_rows(owner, share.test) for owner, share in shares.items()))
    written["test"] = write_text(folder / "test.jsonl", _lines(row for turn in turns for row in turn if row))
    written["public"] = write_text(folder / "public.txt", public)
    return written


def _rows(owner: str, works: dict[str, str]) -> list[dict[str, str]]:
    cut = [[{"text": p, "title": title, "owner": owner} for p in passages(text)] for title, text in works.items()]
    # Works take turns as well, so that a few passages are already a mixture of all of them.
    return [row for turn in zip_longest(*cut) for row in turn if row]


def _lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path: Path, text: str) -> Path:
    """Put ``text`` into a file that is there whole or not at all; return its path."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path
