"""FedBiOT on pico sites: the settings, the public text and the strategy that its tests begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from offsite_fl.config import TuneConfig
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import FedBiOT, OffsiteTuning
from tests.flower_fakes import all_nodes
from tests.pico_clients import owner_with_bundle, two_sites

TUNE = TuneConfig(
    max_steps=2, lr=1e-2, batch_size=2, block_size=12, lora_rank=2, progress=False, device="cpu", optimizer="sgd"
)
PUBLIC = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog. " * 3, "a stitch in time. " * 5]})
ALIGN: dict[str, Any] = {"first_steps": 3, "align_steps": 2, "align_rank": 2, "align_batch": 2, "align_lr": 1e-2}


def fedbiot(**options: Any) -> FedBiOT:
    return FedBiOT(**{"fraction_evaluate": 0.0, **ALIGN, **all_nodes(2), **options})


def strategy_for(owner: ModelOwner, base: Any = None, **options: Any) -> OffsiteTuning:
    return OffsiteTuning(base or fedbiot(), owner, **{"tune": TUNE, "public": PUBLIC, **options})


@pytest.fixture(scope="module", name="owner")
def last_block_owner(tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    """A pico llama that tunes its last block, behind an emulator of two dropped-layer blocks."""
    return owner_with_bundle(tmp_path_factory.mktemp("owner"), first=0)


@pytest.fixture(name="nodes")
def sites(tmp_path: Path) -> dict[int, dict[str, Any]]:
    return two_sites(tmp_path)
