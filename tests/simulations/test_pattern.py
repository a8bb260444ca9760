"""The small model shows what the large one shows: the pattern of the five rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from simulations.pico import pico_folder
from simulations.texts import BOOK_OWNERS, write_book_files

TUNE = TuneConfig(max_steps=64, batch_size=16, lr=1e-3, schedule="cosine", schedule_steps=64, progress=False)


@pytest.mark.slow
def test_the_pattern_of_the_five_rows(tmp_path: Path) -> None:
    files = write_book_files(tmp_path / "data")
    owner = ModelOwner.from_pretrained(pico_folder(progress=False), Split(first=2, last=2))
    bundle = owner.make_bundle("low-rank:keep=0.28", tmp_path / "bundle", calibration=files["public"])
    measure = Measure(owner, files["test"], max_tokens=16384)
    sources = [files[name] for name in BOOK_OWNERS]
    update = DataOwner.open(bundle).tune(measure.pooled(sources), TUNE)
    zero, plug = measure.full_zero_shot().loss, measure.plug_in(update.tensors).loss
    untuned, tuned = measure.emulator_zero_shot().loss, measure.emulator_tuned(update.tensors).loss
    full = measure.full_fine_tuning(sources, replace(TUNE, lr=2e-3)).loss
    assert None not in (zero, plug, untuned, tuned, full)
    # The plug-in gains a part of what full fine-tuning gains, and the tuned emulator stays behind the untuned model.
    assert full < plug < zero < tuned < untuned  # type: ignore[operator]
    assert zero - plug > 0.15 * (zero - full)  # type: ignore[operator]
