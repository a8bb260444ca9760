"""What the report of an emulator measures where little can be measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offsite_fl.emulators import start
from offsite_fl.emulators.report import flops_share
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer
from tests.models.families import built
from tests.models.other_families import OTHERS


def test_a_model_that_wants_more_than_the_smallest_batch_is_bundled_without_its_flops(tmp_path: Path) -> None:
    # SigLIP 2 takes patches, a mask and the grid's shape, which nobody can make up from the config
    owner = ModelOwner(built(OTHERS["siglip2"]), make_tokenizer(), Split(first=1, last=1))
    owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    assert owner.report is not None and owner.report.flops_share is None and owner.report.bytes > 0


def test_flops_of_blocks_that_hand_their_weights_to_modules_are_counted() -> None:
    # DBRX's experts do; the counter follows the gradients of what a module is called with
    model = built(OTHERS["dbrx"])
    context = ModelOwner(model, make_tokenizer(), Split(first=1, last=1)).context()
    before = [(id(p), p.requires_grad, p.detach().clone()) for p in model.parameters()]
    assert flops_share(start(context), context) == pytest.approx(1.0)
    after = [(id(p), p.requires_grad) for p in model.parameters()]
    assert after == [(i, g) for i, g, _ in before]  # counting leaves the owner's parameters as they are
    assert all(torch.equal(t, p) for (_, _, t), p in zip(before, model.parameters(), strict=True))
