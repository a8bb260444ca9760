"""A patch's digest tells every change, and the file gives back what was written."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from offsite_fl.config import LoraOptions
from offsite_fl.errors import UpdateError
from offsite_fl.patch import Patch, digest_of

A, B = "emulator.0.q.lora_A.weight", "emulator.0.q.lora_B.weight"
OPTIONS = LoraOptions(1, 2.0)


def factors() -> dict[str, torch.Tensor]:
    return {A: torch.tensor([[1.0, -2.0]]), B: torch.tensor([[0.5], [0.25], [4.0]])}


def test_the_digest_by_hand() -> None:
    options = [["alpha", 2.0], ["dropout", 0.0], ["rank", 1], ["targets", ""]]
    whole = json.dumps(["patch-1", "d" * 64, options]).encode()
    whole += json.dumps([A, [1, 2]]).encode() + bytes.fromhex("0000803f000000c0")
    whole += json.dumps([B, [3, 1]]).encode() + bytes.fromhex("0000003f0000803e00008040")
    assert Patch(factors(), "d" * 64, OPTIONS).digest == hashlib.sha256(whole).hexdigest()


def test_every_change_changes_it_and_order_does_not() -> None:
    one = factors()
    first = digest_of(one, "d" * 64, OPTIONS)
    assert digest_of(dict(reversed(one.items())), "d" * 64, OPTIONS) == first
    others = [
        digest_of(one, "e" * 64, OPTIONS),
        digest_of(one, "d" * 64, LoraOptions(1, 4.0)),
        digest_of({A: one[A], "other": one[B]}, "d" * 64, OPTIONS),
        digest_of({A: one[A], B: one[B].reshape(1, 3)}, "d" * 64, OPTIONS),
        digest_of({A: one[A], B: one[B].nextafter(torch.tensor(9.0))}, "d" * 64, OPTIONS),
    ]
    assert len({first, *others}) == 6


def test_bytes_and_back() -> None:
    patch = Patch(factors(), "d" * 64, LoraOptions(1, 2.0, targets=("q", "v")))
    back = Patch.from_bytes(patch.to_bytes())
    assert back.options == patch.options and back.bundle == patch.bundle and back.digest == patch.digest


@pytest.mark.parametrize("change", [lambda d: d[:20], lambda d: b"", lambda d: d.replace(b"patch-1", b"patch-9")])
def test_damaged_bytes_are_refused(change: object) -> None:
    data = Patch(factors(), "d" * 64, OPTIONS).to_bytes()
    with pytest.raises(UpdateError, match="a patch can't be read"):
        Patch.from_bytes(change(data))  # type: ignore[operator]
