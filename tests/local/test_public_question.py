"""A site answers one question about public text: the same again, no other, until its operator says so."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offsite_fl.config import TuneConfig
from offsite_fl.errors import StateError
from offsite_fl.local import public_question
from offsite_fl.local.public_question import OtherPublicText, PublicQuestion, admit
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_pico, make_tokenizer

FIRST = PublicQuestion("1" * 64, "2" * 64, 12, "all")


def test_the_first_question_stays_the_only_one(tmp_path: Path) -> None:
    for _ in range(3):
        admit(FIRST, tmp_path, "a")
    for change in ({"public_text": "3" * 64}, {"tokenizer": "3" * 64}, {"block_size": 13}, {"loss_on": "answer"}):
        other = replace(FIRST, **change)  # type: ignore[arg-type]
        with pytest.raises(OtherPublicText, match=f"{next(iter(change)).replace('_', '-')} of this one differs"):
            admit(other, tmp_path, "a")
        admit(other, tmp_path, f"a site that was never asked, {change}")
    admit(FIRST, tmp_path, "a")


def test_the_operator_allows_another_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The site's log names the file to delete, the error doesn't."""
    admit(FIRST, tmp_path, "a")
    other = replace(FIRST, block_size=24)
    with caplog.at_level(logging.ERROR), pytest.raises(OtherPublicText) as told:
        admit(other, tmp_path, "a")
    (path,) = (tmp_path / "public").glob("*.json")
    assert str(path) in caplog.text and str(tmp_path) not in str(told.value)
    assert path.stat().st_mode & 0o077 == 0
    path.unlink()
    admit(other, tmp_path, "a")
    with pytest.raises(OtherPublicText):
        admit(FIRST, tmp_path, "a")


@pytest.mark.parametrize("held", [b"", b"{", b"[1]", b'{"block_size": 12}', b" " * 20_000])
def test_a_file_that_is_no_question_lets_none_through(held: bytes, tmp_path: Path) -> None:
    admit(FIRST, tmp_path, "a")
    (path,) = (tmp_path / "public").glob("*.json")
    path.write_bytes(held)
    with pytest.raises((StateError, OtherPublicText)) as told:
        admit(FIRST, tmp_path, "a")
    assert str(tmp_path) not in str(told.value) and path.read_bytes() == held


def test_what_can_t_be_written_down_isn_t_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(public_question, "write_synced", full)
    with pytest.raises(StateError, match="can't be kept; the reason is in the site's own log"):
        admit(FIRST, tmp_path, "a")


def test_what_makes_a_question(tmp_path: Path) -> None:
    """Another bundle with the same tokenizer asks the same; order and copies of fingerprints don't count."""
    public, tune = np.array([5, 7, 9], np.uint64), TuneConfig(block_size=12)

    def bundle(folder: str, emulator: str, *more: str) -> object:
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(list(more))
        return ModelOwner(make_pico("llama"), tokenizer, Split(1, 1)).make_bundle(emulator, tmp_path / folder)

    one = bundle("one", "layer-drop:keep=2")
    asked = PublicQuestion.of(public, one, tune)  # type: ignore[arg-type]
    shuffled = np.array([9, 5, 7, 5], np.uint64)
    same = PublicQuestion.of(shuffled, bundle("two", "layer-drop:keep=3"), replace(tune, lr=1.0, seed=9))  # type: ignore[arg-type]
    assert same == asked
    others = [
        PublicQuestion.of(public[:2], one, tune),  # type: ignore[arg-type]
        PublicQuestion.of(public, bundle("three", "layer-drop:keep=2", "rain falls"), tune),  # type: ignore[arg-type]
        PublicQuestion.of(public, one, replace(tune, block_size=13)),  # type: ignore[arg-type]
        PublicQuestion.of(public, one, replace(tune, loss_on="answer")),  # type: ignore[arg-type]
    ]
    assert len({asked, *others}) == 5
