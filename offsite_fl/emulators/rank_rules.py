"""How a byte budget is shared out among matrices that become two factors, and the cut of one to its rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Emulator
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.factor import project, put_factors, rank_for
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.low_rank import share_within
from offsite_fl.models.linears import linear_weight

Place = tuple[int, str]
"""A dense linear of an emulator: the index of its block and its path there."""


def places(emulator: Emulator) -> dict[Place, nn.Module]:
    """All dense linears of ``emulator``."""
    return {
        (slot, path): linear
        for slot, block in enumerate(emulator.blocks)
        for path, linear in dense_linears(block.module)
    }


def ranks_by_size(emulator: Emulator, budget: int) -> dict[Place, int]:
    """Ranks at which every matrix keeps the same share of its numbers; matrices that stay dense aren't listed."""
    share = share_within(emulator, lambda _: True, budget)
    ranks = {place: rank_for(share, *linear_weight(linear).shape) for place, linear in places(emulator).items()}
    return {place: rank for place, rank in ranks.items() if rank is not None}


def ranks_by_energy(emulator: Emulator, budget: int, spectra: Mapping[Place, Tensor]) -> dict[Place, int]:
    """The least ranks at which every matrix loses at most the same share of its squared singular values.

    The share is the smallest at which the emulator holds at most ``budget`` bytes. ``spectra`` are singular values, the
    largest first. A matrix that its factors wouldn't make smaller stays dense and isn't listed.
    """
    shapes = {place: linear_weight(linear).shape for place, linear in places(emulator).items()}
    sizes = {place: linear_weight(linear).element_size() for place, linear in places(emulator).items()}
    lost = {place: _lost(spectra[place]) for place in shapes}

    def ranks(share: float) -> dict[Place, int]:
        found = {place: max(1, int((lost[place] > share).sum())) for place in shapes}
        return {p: r for p, r in found.items() if r * sum(shapes[p]) < shapes[p].numel()}

    def held(share: float) -> int:
        saved = (sizes[p] * (shapes[p].numel() - r * sum(shapes[p])) for p, r in ranks(share).items())
        return emulator_bytes(emulator) - sum(saved)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if held(middle) <= budget else (middle, high)
    return ranks(high)


def cut_to(block: nn.Module, path: str, weight: Tensor, rank: int, moments: Tensor | None = None) -> None:
    """Put two factors of ``weight`` [out, in] fp64, truncated at ``rank``, in the place of the linear at ``path``.

    Bias, dtype and mode are those of the linear; ``moments`` are those of its inputs where they are to count.
    """
    put_factors(block, path, *project(weight, moments, rank))


@torch.no_grad()
def spectrum(weight: Tensor, moments: Tensor | None = None) -> Tensor:
    """Singular values of ``weight`` [out, in], the largest first; with ``moments`` C, of ``W C^1/2``. fp64."""
    exact = weight.double()
    if moments is None:
        values: Tensor = torch.linalg.svdvals(exact)
        return values
    core = torch.linalg.qr(exact).R if exact.shape[0] > exact.shape[1] else exact
    values = torch.linalg.eigvalsh(core @ moments @ core.T).clamp(min=0).sqrt().flip(0)
    return values


def _lost(values: Tensor) -> Tensor:
    """By rank from 0 on, the share of the squares that a truncation loses: ``sum_(k > r) s_k^2 / sum_k s_k^2``."""
    squares = values.square()
    left = squares.flip(0).cumsum(0).flip(0)
    return left / left[0].clamp(min=torch.finfo(left.dtype).tiny)
