"""Ranks under a byte budget, by size and by energy, and the cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, Emulator, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.rank_rules import Place, cut_to, places, ranks_by_energy, ranks_by_size, spectrum
from offsite_fl.models.linears import LowRankLinear, linear_weight

MakeContext = Callable[..., Context]


def given(context: Context) -> tuple[Emulator, dict[Place, Tensor]]:
    emulator = start(context)
    return emulator, {place: spectrum(linear_weight(linear).detach()) for place, linear in places(emulator).items()}


def held(emulator: Emulator, ranks: dict[Place, int]) -> int:
    saved = 0
    for place, linear in places(emulator).items():
        rows, columns = linear_weight(linear).shape
        saved += 4 * (rows * columns - ranks[place] * (rows + columns)) if place in ranks else 0
    return emulator_bytes(emulator) - saved


def lost(values: Tensor, rank: int) -> float:
    return float(values[rank:].square().sum() / values.square().sum())


def test_every_dense_linear_has_a_place(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    context = context_of(pico(family))
    found = places(start(context))
    assert {slot for slot, _ in found} == {0, 1, 2, 3}
    assert all(context.block(slot + 1).get_submodule(path) is linear for (slot, path), linear in found.items())
    assert all(
        not path.endswith(("up", "down")) for _, path in places(LowRank(mode="plain").compress(start(context), context))
    )


def test_by_size_is_what_low_rank_does(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    emulator = start(context)
    ranks = ranks_by_size(emulator, emulator_bytes(emulator) // 2)
    built = LowRank(0.5, "plain").compress(emulator, context)
    theirs = {
        (slot, path): module.rank
        for slot, block in enumerate(built.blocks)
        for path, module in block.module.named_modules()
        if isinstance(module, LowRankLinear)
    }
    assert ranks == theirs and len(ranks) == 28


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3, 0.1])
def test_by_energy_all_lose_the_same_share(keep: float, pico_llama: nn.Module, context_of: MakeContext) -> None:
    """There is one share that every matrix keeps within at the least rank, and a smaller one would break the budget."""
    emulator, spectra = given(context_of(pico_llama))
    budget = round(keep * emulator_bytes(emulator))
    ranks = ranks_by_energy(emulator, budget, spectra)
    assert held(emulator, ranks) <= budget
    most = max(lost(spectra[place], rank) for place, rank in ranks.items())
    assert all(rank == 1 or lost(spectra[place], rank - 1) > most for place, rank in ranks.items())
    less = most * (1 - 1e-9)
    more = {p: next(r for r in range(1, 65) if lost(spectra[p], r) <= less) for p in spectra}
    shapes = {p: linear_weight(linear).shape for p, linear in places(emulator).items()}
    more = {p: r for p, r in more.items() if r * sum(shapes[p]) < shapes[p].numel()}
    assert held(emulator, more) > budget


def test_by_energy_gives_rank_to_those_that_need_it(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with torch.no_grad():
        flat = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
        context.block(1).get_submodule("self_attn.q_proj").weight.copy_(flat)  # type: ignore[operator]
        context.block(1).get_submodule("self_attn.o_proj").weight.copy_(torch.ones(32, 32))  # type: ignore[operator]
    emulator, spectra = given(context)
    ranks = ranks_by_energy(emulator, emulator_bytes(emulator) // 3, spectra)
    assert ranks[0, "self_attn.o_proj"] == 1
    # all directions of an orthogonal matrix weigh the same: it is the last to fit in two factors
    assert ranks.get((0, "self_attn.q_proj"), 32) > max(r for p, r in ranks.items() if p[1] == "self_attn.o_proj")


def test_below_rank_one_there_is_nothing(pico_llama: nn.Module, context_of: MakeContext) -> None:
    emulator, spectra = given(context_of(pico_llama))
    assert set(ranks_by_energy(emulator, 1, spectra).values()) == {1}
    assert set(ranks_by_size(emulator, 1).values()) == {1}


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_the_spectrum_with_moments(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(30, shape[1], generator=generator, dtype=torch.float64)
    assert_close(spectrum(weight), torch.linalg.svdvals(weight))
    assert_close(spectrum(weight, x.T @ x), torch.linalg.svdvals(x @ weight.T)[:5])


def test_the_cut(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Another weight of a lower rank stands there afterwards; bias and dtype are the linear's (here a Conv1D)."""
    block = context_of(pico("gpt2").to(torch.bfloat16), calibration=()).block(1)
    old = block.get_submodule("mlp.c_fc")
    weight = torch.randn(128, 3, dtype=torch.float64) @ torch.randn(3, 32, dtype=torch.float64)
    cut_to(block, "mlp.c_fc", weight, 3)
    new = block.get_submodule("mlp.c_fc")
    assert isinstance(new, LowRankLinear) and new.rank == 3 and not new.training
    assert torch.equal(new.up.bias, old.bias) and new.up.weight.dtype == torch.bfloat16
    product = linear_weight(new.up).double() @ linear_weight(new.down).double()
    assert_close(product, weight, rtol=0.05, atol=0.1)
