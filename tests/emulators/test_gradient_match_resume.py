"""A search for blocks to drop that goes on after an interruption ends as if it had never been interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from offsite_fl.emulators import gradient_match
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.block_trials import BlockTrials
from offsite_fl.emulators.gradient_match import GradientMatching
from offsite_fl.errors import CheckpointError

from .conftest import compressed

MakeContext = Callable[..., Context]
METHOD = GradientMatching(1, tokens=32, pool=2)


class Interrupted(Exception):
    """Stands for a killed process."""


class Trials:
    """Notes which places were asked for and what came out; ``stop`` is the trial that is interrupted."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], float]] = []
        self.made = 0
        self.stop: int | None = None


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trials]:
    found = Trials()

    class Watched(BlockTrials):
        def __init__(self, *args: Any) -> None:
            found.made += 1
            super().__init__(*args)

        def cosine(self, places: Collection[int]) -> float:
            if len(found.asked) == found.stop:
                raise Interrupted
            found.asked.append((tuple(places), super().cosine(places)))
            return found.asked[-1][1]

    monkeypatch.setattr(gradient_match, "BlockTrials", Watched)
    yield found


def interrupted(context: Context, trials: Trials, after: int) -> None:
    trials.asked, trials.stop = [], after
    with pytest.raises(Interrupted):
        compressed(METHOD, context)
    trials.asked, trials.stop = [], None


@pytest.mark.parametrize(
    ("after", "repeated"),
    [(3, 0), (5, 5), (6, 5), (7, 7), (8, 7)],
    ids=["before any drop", "at a drop", "within the second", "at the second", "within the third"],
)
def test_interrupted_and_resumed_equals_at_once(
    after: int, repeated: int, pico_llama: nn.Module, context_of: MakeContext, trials: Trials, tmp_path: Path
) -> None:
    """Four blocks to one by pools of two: a value of all, 4 tries, and 2 for each later drop."""
    whole, cut = (context_of(pico_llama, workdir=tmp_path / name) for name in ("whole", "cut"))
    at_once = compressed(METHOD, replace(whole, workdir=None))
    asked = trials.asked
    assert len(asked) == 1 + 4 + 2 + 2
    interrupted(cut, trials, after)
    resumed = compressed(METHOD, cut)
    assert resumed.positions == at_once.positions
    assert trials.asked == asked[repeated:], "it must go on at the drop where it stopped, not begin anew"
    compressed(METHOD, whole)
    (theirs,), (ours,) = ([p for p in c.workdir.rglob("*") if p.is_file()] for c in (whole, cut) if c.workdir)
    assert ours.parent.name == theirs.parent.name and ours.read_bytes() == theirs.read_bytes()
    trials.asked, trials.made = [], 0
    assert compressed(METHOD, cut).positions == at_once.positions
    assert (trials.asked, trials.made) == ([], 0), "a finished search is read back"


def test_a_state_of_another_search_is_not_met(
    pico_llama: nn.Module, pico: Callable[..., nn.Module], context_of: MakeContext, trials: Trials, tmp_path: Path
) -> None:
    context = context_of(pico_llama, workdir=tmp_path)
    first, *rest = context.calibration
    other_text = {**first, "input_ids": first["input_ids"].roll(1, dims=1)}
    moved = Emulator([EmulatorBlock(context.block(i), i) for i in (2, 1, 3, 4)], {1: 0, 2: 1, 3: 2, 4: 3})
    interrupted(context, trials, 6)
    for method, emulator, other in (
        (replace(METHOD, pool=3), start(context), context),
        (replace(METHOD, keep=2), start(context), context),
        (METHOD, start(context), replace(context, calibration=(other_text, *rest))),
        (METHOD, start(context), replace(context, seed=1)),
        (METHOD, moved, context),
        (METHOD, None, replace(context, model=pico("llama", seed=1))),
    ):
        trials.asked = []
        method.compress(start(other) if emulator is None else emulator, other)
        assert trials.asked[0][0] == (1, 2, 3, 4), "it must begin with all"
    assert len(list(tmp_path.rglob("state.json"))) == 7
    trials.asked = []
    compressed(METHOD, context)
    assert len(trials.asked) == 4, "its own state is still there"


def test_text_that_is_not_read_has_no_say(
    pico_llama: nn.Module, context_of: MakeContext, trials: Trials, tmp_path: Path
) -> None:
    """The first two of 12 rows hold the 32 tokens."""
    context = context_of(pico_llama, workdir=tmp_path)
    interrupted(context, trials, 6)
    compressed(METHOD, replace(context, calibration=context.calibration[:1]))
    assert len(trials.asked) == 4


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def with_entry(name: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        with_entry("format", 2),
        with_entry("fingerprint", "0" * 64),
        with_entry("dropped", [9]),
        with_entry("dropped", [2, 2]),
        with_entry("dropped", []),
        with_entry("dropped", [1, 2, 3, 4]),
        with_entry("costs", [[0, 0.5]]),
        with_entry("costs", [1]),
        with_entry("value", None),
    ],
)
def test_a_damaged_state_says_so(
    damage: Callable[[Path], None], pico_llama: nn.Module, context_of: MakeContext, trials: Trials, tmp_path: Path
) -> None:
    context = context_of(pico_llama, workdir=tmp_path)
    interrupted(context, trials, 6)
    (path,) = tmp_path.rglob("state.json")
    damage(path)
    with pytest.raises(CheckpointError, match=r"state\.json can't be read .*; delete it to start anew"):
        compressed(METHOD, context)
    path.unlink()
    compressed(METHOD, context)
    assert len(trials.asked) == 9


def test_the_bar_goes_on_where_it_was(
    pico_llama: nn.Module, context_of: MakeContext, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[int, int]] = []
    bar = gradient_match.training_bar

    def watched(name: str, context: Context, total: int, done: int = 0) -> Any:
        bars.append((done, total))
        return bar(name, context, total, done)

    monkeypatch.setattr(gradient_match, "training_bar", watched)
    context = context_of(pico_llama, workdir=tmp_path)
    interrupted(context, trials, 6)
    compressed(METHOD, context)
    assert bars == [(0, 9), (5, 9)]
