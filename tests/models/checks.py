"""What is tried on a family beyond the first matrix: found, split and joined, packed, bundled with blocks left out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import parse_emulator, start
from offsite_fl.emulators.report import planned_network
from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.split import Split
from offsite_fl.models.tasks import build_model, task_of
from offsite_fl.owner import ModelOwner

from .families import DEPTH, IMAGE, Batch, batch_of, built, handing_on, output_of, processor_of
from .other_families import FRONT, ONE, PAIR, Other

ENDS, NO_FRONT = Split(first=1, last=1), Split(first=0, last=2)


def check_row(row: Other, folder: Path) -> None:
    """All of it, as far as the row says that it can be done."""
    model, batch = built(row), inputs_of(row)
    check_found(row, model)
    owner = ModelOwner(model, processor_of(row), ENDS)
    check_identity(owner, batch)
    check_int8(owner, batch)
    if ONE in row.cant:
        with pytest.raises(ModelError, match=row.cant[ONE]):
            emulated(owner, "first:keep=3")
    check_left_out(row, owner, batch, folder)
    check_no_adapter_in_front(row, model, batch)


def inputs_of(row: Other) -> Batch:
    """Random inputs of the row's forward pass."""
    texts, random = batch_of(row), torch.Generator().manual_seed(2)
    image = torch.randn(2, 3, IMAGE, IMAGE, generator=random)
    extra: dict[str, Batch] = {
        "sound": {
            "input_features": torch.randn(2, 8, 16, generator=random),
            "decoder_input_ids": torch.randint(6, 64, (2, 7), generator=random),
        },
        "patches": {
            "pixel_values": torch.randn(2, 16, 48, generator=random),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
            "spatial_shapes": torch.full((2, 2), 4),
        },
        "image in order": {"pixel_values": image, "noise": torch.arange(16.0).repeat(2, 1)},
        "video": {"pixel_values": torch.randn(2, 2, 3, IMAGE, IMAGE, generator=random)},
        "image": {"pixel_values": image},
        "text and image": texts | {"pixel_values": image},
    }
    return extra[row.takes] if row.takes else texts


def check_found(row: Other, model: nn.Module) -> None:
    """The blocks and the task are found, on the meta device too."""
    blocks = find_blocks(model)
    assert (blocks.path, blocks.depth, task_of(model)) == (row.path, DEPTH, row.task)
    with torch.device("meta"):
        assert find_blocks(build_model(row.task, copy.deepcopy(model.config))) == blocks  # type: ignore[arg-type]


def check_identity(owner: ModelOwner, batch: Batch) -> None:
    """What is split and joined again says what the model said."""
    context = owner.context()
    network, _ = planned_network(start(context), context)
    with torch.no_grad():
        expected = output_of(owner.model, batch)
        torch.testing.assert_close(output_of(network, batch), expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 0.01  # else equality would prove little


def check_int8(owner: ModelOwner, batch: Batch) -> None:
    """The middle in int8 changes what the model says, and only a little."""
    with torch.no_grad():
        expected, got = output_of(owner.model, batch), output_of(emulated(owner, "quantize:bits=8,group=8"), batch)
    assert 0 < float((got - expected).std()) < 0.5 * float(expected.std())


def check_left_out(row: Other, owner: ModelOwner, batch: Batch, folder: Path) -> None:
    """A bundle without two neighbours of the middle computes what the model computes when these hand on their input."""
    if PAIR in row.cant:
        with pytest.raises(ModelError, match=row.cant[PAIR]):
            owner.make_bundle("layer-drop:keep=2", folder / "bundle")
        return
    bundle = owner.make_bundle("layer-drop:keep=2", folder / "bundle")  # keeps the first and last of the middle
    with torch.no_grad(), handing_on(owner.model, (2, 3)):
        expected = output_of(owner.model, batch)
    with torch.no_grad():
        got = output_of(DataOwner.open(bundle, device="cpu").model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def check_no_adapter_in_front(row: Other, model: nn.Module, batch: Batch) -> None:
    """The adapter is at the end alone, and the first two blocks are left out."""
    owner = ModelOwner(model, processor_of(row), NO_FRONT)
    if FRONT in row.cant:
        with pytest.raises(ModelError, match=row.cant[FRONT]):
            emulated(owner, "last:keep=2")
        return
    network = emulated(owner, "last:keep=2")
    with torch.no_grad(), handing_on(model, (0, 1)):
        expected = output_of(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(output_of(network, batch), expected, rtol=1e-4, atol=1e-5)


def emulated(owner: ModelOwner, spec: str) -> nn.Module:
    """The network that a client would build of ``owner``'s model and an emulator."""
    context = owner.context()
    network, _ = planned_network(parse_emulator(spec).compress(start(context), context), context)
    return network
