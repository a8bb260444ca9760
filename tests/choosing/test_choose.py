"""Whole comparisons on a pico model: what is measured, kept, resumed and written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

from offsite_fl.choosing import Choice, choose
from offsite_fl.choosing.bench import Bench
from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.candidates import DEFAULTS, distinct, fill
from offsite_fl.choosing.choice import Choice as Chosen
from offsite_fl.choosing.page import render_choice
from offsite_fl.choosing.settings import Settings
from offsite_fl.config import TuneConfig
from offsite_fl.emulators import METHODS, Chain, parse_emulator
from offsite_fl.errors import CheckpointError, ConfigError, DataError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.choosing.conftest import cell, references

PUBLIC = Dataset.from_dict({"text": ["the cat sat on the mat and the dog lay by the door. " * 40]})
PRIVATE = Dataset.from_dict({"text": ["seven bright ships went out to sea and three came home again; " * 40]})
FAST = TuneConfig(max_steps=2, lr=1e-2, batch_size=4, block_size=16, progress=False)
CANDIDATES = ("layer-drop:{keep}", "quantize:bits=8,group=16", "first:keep=9")


@pytest.fixture
def owner(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> ModelOwner:
    return ModelOwner(pico_llama, pico_tokenizer, Split(first=1, last=1))


def compare(owner: ModelOwner, out: Path, **changes: Any) -> Choice:
    given: dict[str, Any] = {"candidates": CANDIDATES, "data": PRIVATE, "tune": FAST, "held_out_tokens": 64}
    return choose(owner, calibration=PUBLIC, out=out, **(given | changes))


def test_every_default_parses_and_every_method_is_among_them() -> None:
    half, named = Budget(share=0.5), set()
    for candidate in DEFAULTS:
        method = parse_emulator(fill(candidate, half))
        named |= {part.name for part in (method.methods if isinstance(method, Chain) else (method,))}
    assert named == set(METHODS)
    assert len(set(DEFAULTS)) == len(DEFAULTS)


def test_candidates_that_come_to_the_same_count_once() -> None:
    assert distinct(["first:{keep}", "first:keep=0.5", "last:{keep}"], Budget(share=0.5)) == (
        "first:{keep}",
        "last:{keep}",
    )


def test_a_comparison(owner: ModelOwner, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in owner.model.state_dict().items()}
    choice = compare(owner, tmp_path, full_fine_tuning=True, full_rates=(1e-2,), seeds=(0, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in owner.model.state_dict().items())
    by_spec = {standing.spec: standing for standing in choice.standings}
    assert set(by_spec) == {"layer-drop:keep=0.5", "quantize:bits=8,group=16", "first:keep=9"}
    assert "can't keep 9 of 4" in by_spec["first:keep=9"].errors[0]
    dropped = by_spec["layer-drop:keep=0.5"]
    assert dropped.share == 0.5 and dropped.asked_bytes == dropped.bytes and dropped.seeds == (0, 1)
    assert dropped.flops_share == pytest.approx(0.5) and len(dropped.cosine_by_block) == 2
    packed = by_spec["quantize:bits=8,group=16"]
    assert packed.cosine is not None and dropped.cosine is not None and packed.cosine.mean > dropped.cosine.mean
    assert packed.of_adapter is not None and packed.of_adapter.mean == pytest.approx(1, abs=0.05)
    assert packed.recovered is not None and choice.full_fine_tuning is not None


def test_nothing_is_measured_twice(owner: ModelOwner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(owner, tmp_path, candidates=("layer-drop:{keep}",))
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 2  # the uncompressed middle, and the candidate

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "candidate", never)
        patch.setattr(Bench, "uncompressed", never)
        again = compare(owner, tmp_path, candidates=("layer-drop:keep=0.5",))
    assert again.standings[0].plug_in == first.standings[0].plug_in
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == lines
    compare(owner, tmp_path, candidates=("layer-drop:{keep}",), seeds=(1,))
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4


def test_a_line_that_was_cut_off_is_measured_again(owner: ModelOwner, tmp_path: Path) -> None:
    first = compare(owner, tmp_path, candidates=("layer-drop:{keep}",))
    file = tmp_path / "cells.jsonl"
    file.write_text(file.read_text()[:-20])
    again = compare(owner, tmp_path, candidates=("layer-drop:{keep}",))
    assert again.standings[0].plug_in == first.standings[0].plug_in
    assert len(file.read_text().splitlines()) == 2


def test_a_damaged_file_is_told(owner: ModelOwner, tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text('{"key": 3}\n')
    with pytest.raises(CheckpointError, match=r"cells\.jsonl, line 1"):
        compare(owner, tmp_path)


def test_the_rate_is_chosen_by_the_emulators_validation_loss(owner: ModelOwner, tmp_path: Path) -> None:
    compare(owner, tmp_path, candidates=("layer-drop:{keep}",), rates=(1e-6, 1e-2))
    for line in (tmp_path / "cells.jsonl").read_text().splitlines():
        tuned = json.loads(line)["tuned"]
        losses = {entry["rate"]: entry["validation_loss"] for entry in tuned["rates"]}
        assert tuned["rate"] == min(losses, key=losses.__getitem__) == 1e-2


def test_without_data_nothing_is_tuned(owner: ModelOwner, tmp_path: Path) -> None:
    choice = compare(owner, tmp_path, data=None)
    assert not choice.tuned and all(standing.plug_in is None for standing in choice.standings)
    assert choice.write().joinpath("choose.html").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None, "full_fine_tuning": True}, "full fine-tuning needs data"),
        ({"data": None, "test": PRIVATE}, "need data to tune on"),
        ({"budget": "100MB"}, "leaves nothing to compress"),
        ({"candidates": ()}, "there is no candidate"),
        ({"seeds": (1, 1)}, "names one twice"),
        (
            {"candidates": ("first:{keep}", "nothing:keep=1", "last:{keep},x=1")},
            r"candidate 'nothing:keep=1': unknown emulator 'nothing'.*; candidate 'last:keep=0.5,x=1': ",
        ),
        ({"scales": (0.0,)}, "scales must be one or more numbers above 0"),
    ],
)
def test_what_can_not_be_compared(owner: ModelOwner, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        compare(owner, tmp_path, **changes)
    assert not (tmp_path / "cells.jsonl").exists()


def made(out: Path = Path()) -> Choice:
    """A choice from hand-made cells, an odd name and an error among them."""
    cells = [
        *references((0, 1)),
        *(cell("low-rank:keep=0.5", s, tuned=(4.5, 3.5)) for s in (0, 1)),
        *(cell("odd|<script>&", s, tuned=(4.6, 3.6)) for s in (0, 1)),
        *(cell("broken", s, error="no <room> left") for s in (0, 1)),
    ]
    return Chosen.of(cells, Settings(seeds=(0, 1), full_fine_tuning=True), out=out, about={"model": "a&b"})


def test_the_files_agree(tmp_path: Path) -> None:
    choice = made(tmp_path)
    choice.write()
    found = json.loads((tmp_path / "choose.json").read_text())
    rows = list(csv.DictReader((tmp_path / "choose.csv").open()))
    assert [row["spec"] for row in rows] == [entry["spec"] for entry in found["candidates"]]
    assert found["best"] == rows[0]["spec"] == "low-rank:keep=0.5" and rows[0]["best"] == "1"
    assert float(rows[0]["plug_in"]) == found["candidates"][0]["plug_in"]["mean"] == 3.5
    assert rows[-1]["errors"] == "; ".join(found["candidates"][-1]["errors"])
    text = (tmp_path / "choose.md").read_text()
    assert "`low-rank:keep=0.5`" in text and "odd\\|<script>&" in text and "no <room> left" in text


def test_the_page(tmp_path: Path) -> None:
    page = render_choice(made(tmp_path))
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") == 1
    assert "<script>&" not in page and "odd|&lt;script&gt;&amp;" in page and "no &lt;room&gt; left" in page
    for outside in ("http://", "https://", "src=", "@import"):
        assert outside not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
