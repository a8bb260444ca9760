"""Other values in weight matrices and everything else shared."""

from __future__ import annotations

import torch
from torch import nn

from offsite_fl.emulators.weights import with_matrices


def test_matrices_change_and_vectors_are_shared() -> None:
    block = nn.ModuleDict({"a": nn.Linear(3, 2).half(), "norm": nn.LayerNorm(2), "conv": nn.Conv1d(2, 2, 3)})
    block.register_buffer("table", torch.ones(2, 2))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    made = with_matrices(block, lambda weight: weight.float() * 2)
    for name, value in made.state_dict(keep_vars=True).items():
        own = block.state_dict(keep_vars=True)[name]
        if name in ("a.weight", "conv.weight"):
            assert torch.equal(value, before[name] * 2) and value.dtype == own.dtype and not value.requires_grad
        else:
            assert value is own
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_tied_matrices_stay_tied() -> None:
    block = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    block[1].weight = block[0].weight
    calls: list[torch.Tensor] = []

    def negative(weight: torch.Tensor) -> torch.Tensor:
        calls.append(weight)
        return -weight

    made = with_matrices(block, negative)
    assert made[0].weight is made[1].weight and len(calls) == 1  # type: ignore[index]
