"""Uniform LayerDrop against the index lists of the published code (absolute where the split is 2-n-2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from offsite_fl.emulators.base import Context, Emulator, start
from offsite_fl.emulators.layer_drop import LayerDrop, Rounding, kept_indices
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError

MakeContext = Callable[..., Context]

PUBLISHED: list[tuple[str, int, int, Rounding, str]] = [
    ("OPT-1.3B 2-8-2", 20, 8, "round", "2,5,7,10,13,16,18,21"),
    ("OPT-1.3B 2-8-2", 20, 8, "floor", "2,4,7,10,12,15,18,21"),
    ("GPT2-XL 2-16-2", 44, 16, "round", "2,5,8,11,13,16,19,22,25,28,31,34,36,39,42,45"),
    ("OPT-6.7B 2-18-2", 28, 18, "round", "2,4,5,7,8,10,12,13,15,16,18,19,21,23,24,26,27,29"),
    ("BLOOM 2-12-2", 26, 12, "round", "2,4,7,9,11,13,16,18,20,22,25,27"),
    ("BLOOM 2-18-2", 26, 18, "round", "2,3,5,6,8,9,11,12,14,15,17,18,20,21,23,24,26,27"),
]
FEDBIOT = [
    (30, 24, "0 1 2 3 5 6 7 8 10 11 12 13 15 16 17 18 20 21 22 23 25 26 27 29"),
    (30, 15, "0 2 4 6 8 10 12 14 16 18 20 22 24 26 29"),
    (28, 22, "0 1 2 3 5 6 7 9 10 11 12 14 15 16 18 19 20 21 23 24 25 27"),
    (28, 14, "0 2 4 6 8 10 12 14 16 18 20 22 24 27"),
]


@pytest.mark.parametrize(("name", "total", "keep", "rounding", "expected"), PUBLISHED)
def test_lists_of_offsite_tuning(name: str, total: int, keep: int, rounding: Rounding, expected: str) -> None:
    assert [2 + i for i in kept_indices(total, keep, rounding)] == [int(i) for i in expected.split(",")]


@pytest.mark.parametrize(("total", "keep", "expected"), FEDBIOT)
def test_lists_of_fedbiot(total: int, keep: int, expected: str) -> None:
    assert kept_indices(total, keep, "floor") == tuple(int(i) for i in expected.split())


@pytest.mark.parametrize(("total", "rate", "keep"), [(30, 0.2, 24), (30, 0.5, 15), (28, 0.2, 22), (28, 0.5, 14)])
def test_share_counts_like_fedbiots_drop_rate(total: int, rate: float, keep: int) -> None:
    """n = round(M * (1 - drop rate)) there; keep = 1 - rate here."""
    assert round((1 - rate) * total) == keep
    assert len(kept_indices(total, round((1 - rate) * total), "floor")) == keep


def test_half_goes_to_the_even_index() -> None:
    """4 of 6: 0, 5/3, 10/3, 5; 3 of 6: 0, 2.5, 5; 3 of 8: 0, 3.5, 7."""
    assert kept_indices(6, 4) == (0, 2, 3, 5)
    assert kept_indices(6, 3) == (0, 2, 5)
    assert kept_indices(8, 3) == (0, 4, 7)


@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_no_layer_repeats_and_the_ends_survive(rounding: Rounding) -> None:
    for total in range(2, 40):
        for keep in range(2, total + 1):
            kept = kept_indices(total, keep, rounding)
            assert len(set(kept)) == keep and kept[0] == 0 and kept[-1] == total - 1


@pytest.mark.parametrize("keep", [0, 1, 5, 11])
def test_more_than_there_are_or_less_than_two(keep: int) -> None:
    """FATE's GPT-2 example asks 11 of 8 and repeats layers; 1 divides by zero."""
    with pytest.raises(EmulatorError, match=f"can't keep {keep} of 4 middle blocks: .*between 2 and 4"):
        kept_indices(4, keep)


def test_compress_keeps_the_owners_modules(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    emulator = LayerDrop(keep=2).compress(start(context), context)
    assert emulator.positions == (1, 4)
    assert [block.origin for block in emulator.blocks] == [1, 4]
    assert emulator.at(4) is context.block(4)


def test_a_share_of_the_middle(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    assert LayerDrop(keep=0.75).compress(start(context), context).positions == (1, 3, 4)
    with pytest.raises(EmulatorError, match="keep 1 of 4"):
        LayerDrop(keep=0.25).compress(start(context), context)


def test_shared_blocks_stay_shared(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    whole = start(context)
    sharing = Emulator([whole.blocks[0], whole.blocks[3]], {1: 0, 2: 0, 3: 1, 4: 1})
    kept = LayerDrop(keep=2).compress(sharing, context)
    assert kept.layout == {1: 0, 4: 1}
    assert LayerDrop(keep=3).compress(sharing, context).layout == {1: 0, 3: 1, 4: 1}


@pytest.mark.parametrize("keep", ["1", "0", "-3", "2.5"])
def test_impossible_numbers(keep: str) -> None:
    with pytest.raises(ConfigError, match=r"number of blocks .* or a share"):
        parse_emulator(f"layer-drop:keep={keep}")
