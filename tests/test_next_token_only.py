"""What compares and aligns by the next-token loss refuses a classifier before anything else is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite_fl.alignment.aligner import Aligner
from offsite_fl.comparing.bench import Bench
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.errors import ModelError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer
from tests.pico_classifiers import make_classifier

SAID = "BertForSequenceClassification is a model for sequence-classification: it has no next-token loss"
TEXT = "the cat sat on the mat. " * 40


@pytest.fixture
def owner(tmp_path: Path) -> ModelOwner:
    (tmp_path / "public.txt").write_text(TEXT)
    return ModelOwner(make_classifier("bert"), make_tokenizer(), Split(first=1, last=1))


def test_aligning(owner: ModelOwner, tmp_path: Path) -> None:
    owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    with pytest.raises(ModelError, match=SAID):
        Aligner(owner, tmp_path / "public.txt")


def test_comparing(owner: ModelOwner, tmp_path: Path) -> None:
    owner.save(tmp_path / "model")
    (tmp_path / "north.jsonl").write_text(f'{{"text": "{TEXT}"}}\n')
    settings = GridSettings.of(
        {
            "model": {"path": str(tmp_path / "model"), "split": "1-1"},
            "data": {"folder": str(tmp_path), "owners": ["north"], "test": "north.jsonl"},
            "grid": {"strategies": ["fedavg"], "emulators": ["layer-drop:keep=2"]},
        }
    )
    with pytest.raises(ModelError, match=SAID):
        Bench(settings, tmp_path / "out")
