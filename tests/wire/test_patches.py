"""A patch in a message: the same to the bit on the other side, and nothing is believed unchecked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from offsite_fl.config import LoraOptions
from offsite_fl.errors import WireError
from offsite_fl.patch import Patch
from offsite_fl.wire import names
from offsite_fl.wire.patches import make_patch, read_patch
from tests.flower_fakes import carried

PATCH = Patch(
    {
        "emulator.0.q.lora_A.weight": torch.tensor([[1e-30, -2.5]]),
        "emulator.0.q.lora_B.weight": torch.tensor([[1 / 3]]),
    },
    "d" * 64,
    LoraOptions(1, 4.0, targets=("q", "v")),
)
PUBLIC = np.array([1, 2**64 - 1], dtype=np.uint64)


def test_there_and_back() -> None:
    found = read_patch(carried(make_patch(PATCH, PUBLIC)))
    assert found.digest == PATCH.digest == found.patch.digest
    assert found.patch.options == PATCH.options and found.patch.bundle == PATCH.bundle
    assert found.public.tolist() == PUBLIC.tolist()


def test_no_public_examples_and_no_targets() -> None:
    bare = Patch(PATCH.tensors, PATCH.bundle, LoraOptions(1, 4.0))
    found = read_patch(carried(make_patch(bare, PUBLIC[:0])))
    assert found.patch.options.targets == () and found.public.size == 0


@pytest.mark.parametrize(
    ("arrays", "config", "message"),
    [
        ({names.PUBLIC: None}, {}, "comes with an array 'public.examples'"),
        ({names.PUBLIC: Array(np.zeros((2, 2), np.uint64))}, {}, "has 2 dimensions, expected 1"),
        ({names.PUBLIC: Array(np.zeros(2, np.int64))}, {}, "has dtype 'int64', expected uint64"),
        ({"emulator.0.q.lora_A.weight": Array(np.zeros(2, np.float32))}, {}, "has 1 dimensions, expected 2"),
        (
            {"emulator.0.q.lora_A.weight": Array(np.zeros((1, 2), np.float16))},
            {},
            "has dtype 'float16', expected float32",
        ),
        ({}, {"patch.lora.rank": 2**40}, "lora_A.weight' has rank 1, the patch's options say 1099511627776"),
        ({"emulator.0.q.lora_B.weight": Array(np.zeros((1, 3), np.float32))}, {}, "lora_B.weight' has rank 3"),
        ({"emulator.0.q.weight": Array(np.zeros((1, 1), np.float32))}, {}, "is no LoRA factor"),
        ({}, {"patch.lora.rank": 0}, "the patch's options: lora rank must be at least 1"),
        ({}, {"patch.lora.ranks": 2}, "did you mean 'rank'"),
        ({}, {names.PATCH: 5}, "patch.digest must be text"),
    ],
)
def test_what_is_wrong_is_named(arrays: dict[str, Array | None], config: dict[str, object], message: str) -> None:
    content = make_patch(PATCH, PUBLIC)
    changed = {**content.array_records[names.ARRAYS], **arrays}
    kept = ArrayRecord({name: array for name, array in changed.items() if array is not None})
    settings = ConfigRecord({**content.config_records[names.CONFIG], **config})  # type: ignore[dict-item]
    with pytest.raises(WireError, match=message):
        read_patch(RecordDict({names.ARRAYS: kept, names.CONFIG: settings}))
