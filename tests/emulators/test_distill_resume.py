"""Distillation that goes on after an interruption ends as if it had never been interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from offsite_fl.emulators import distill, training_state
from offsite_fl.emulators.distill import Distill
from offsite_fl.errors import CheckpointError

from .conftest import dropped, make_context, same, weights
from .trained import text_batches, trained_llama

Pico = Callable[..., nn.Module]


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("more", [0, 2], ids=["at a checkpoint", "between two"])
def test_interrupted_and_resumed_equals_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    model, batches, _ = trained_llama()
    context = make_context(model, calibration=batches, seed=3)
    emulator = dropped(context)
    method = Distill(steps=12, lr=1e-3, weight_decay=0.1, eval_every=3)
    at_once = method.compress(emulator, context)
    again = method.compress(emulator, replace(context, seed=4))
    assert not same(weights(at_once), weights(again)), "the seed must matter"
    steps: list[int] = []
    step_of = distill.DistillRun._step

    def step(self: Any, number: int) -> float:
        if len(steps) == 6 + more:
            steps.clear()
            raise Interrupted
        steps.append(number)
        return step_of(self, number)

    monkeypatch.setattr(distill.DistillRun, "_step", step)
    resumable = replace(context, workdir=tmp_path)
    with pytest.raises(Interrupted):
        method.compress(emulator, resumable)
    assert same(weights(method.compress(emulator, resumable)), weights(at_once))
    assert steps == list(range(6, 12)), "it must go on at the checkpoint, not begin anew"
    assert not list(tmp_path.rglob("*.part"))
    steps.clear()
    assert same(weights(method.compress(emulator, resumable)), weights(at_once))
    assert steps == [], "a finished run is read back"


def test_the_published_way_resumes_bit_for_bit(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(pico("gpt2", resid_pdrop=0.1), calibration=text_batches(3))
    method = Distill(steps=6, lr=1e-3, w_lm=0.0, eval_every=2, select="train", accumulate=2, mask=False, dropout=True)
    emulator = dropped(context)
    at_once = method.compress(emulator, context)
    step_of = distill.DistillRun._step

    def step(self: Any, number: int) -> float:
        if number == 3 and not list(tmp_path.rglob("cut")):
            (tmp_path / "cut").touch()
            raise Interrupted
        return step_of(self, number)

    monkeypatch.setattr(distill.DistillRun, "_step", step)
    with pytest.raises(Interrupted):
        method.compress(emulator, replace(context, workdir=tmp_path))
    assert same(weights(method.compress(emulator, replace(context, workdir=tmp_path))), weights(at_once))


def test_a_checkpoint_of_another_run_is_not_met(tmp_path: Path) -> None:
    model, batches, _ = trained_llama()
    context = make_context(model, calibration=batches, workdir=tmp_path)
    method = Distill(steps=2, eval_every=2)
    emulator, other = dropped(context), dropped(context, 3)
    for run in (method, replace(method, lr=2e-4)):
        for start_from in (emulator, other):
            run.compress(start_from, context)
    method.compress(emulator, replace(context, seed=1))
    method.compress(emulator, replace(context, calibration=batches[:-1]))
    assert len(list(tmp_path.rglob("state.safetensors"))) == 6


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    model, batches, _ = trained_llama()
    context = make_context(model, calibration=batches, workdir=tmp_path)
    method = Distill(steps=2, eval_every=2)
    method.compress(dropped(context), context)
    (path,) = tmp_path.rglob("state.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="delete it to start anew"):
        method.compress(dropped(context), context)


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, _ = trained_llama()
    context = make_context(model, calibration=batches, workdir=tmp_path)
    emulator, method = dropped(context), Distill(steps=6, eval_every=2)
    move, moves = training_state.os.replace, []

    def crash(*paths: Path) -> None:
        moves.append(1)
        if len(moves) == 2:
            raise Interrupted
        move(*paths)

    monkeypatch.setattr(training_state.os, "replace", crash)
    with pytest.raises(Interrupted):
        method.compress(emulator, context)
    resumed = method.compress(emulator, context)
    assert same(weights(resumed), weights(method.compress(emulator, replace(context, workdir=None))))
