"""Training under a penalty: the loss, its ramp, the measure after the cut, resuming, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators import smooth_training
from offsite_fl.emulators.base import Context, Emulator, start
from offsite_fl.emulators.distill import Distill, DistillRun
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.penalties import Kind, Penalty
from offsite_fl.emulators.rank_rules import places, ranks_by_size
from offsite_fl.emulators.report import emulated_network, hidden_error
from offsite_fl.emulators.smooth import Smooth
from offsite_fl.emulators.smooth_training import SmoothRun, SmoothTraining
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.linears import linear_weight
from tests.emulators.test_penalties import difference_matrix
from tests.emulators.trained import trained_llama

MakeContext = Callable[..., Context]
QUICK: dict[str, Any] = {"mode": "train", "attention": "nuc", "mlp": "nuc", "lr": 3e-3}


def run_of(context: Context, penalties: dict[str, tuple[Penalty, ...]], **options: Any) -> SmoothRun:
    """A run with ``penalties`` by path in every block."""
    emulator = start(context)
    settings = SmoothTraining(**({"steps": 20, "lam": 0.5, "select": "distill"} | options))
    everywhere = {(slot, path): penalties[path] for slot, path in places(emulator) if path in penalties}
    ranks = ranks_by_size(emulator, 60_000)
    text = list(context.calibration)
    return SmoothRun(settings, emulator, context, text, text, everywhere, lambda _: ranks)


def slow_penalty(weight: Tensor, kind: str) -> float:
    """R of methods.md 5.2 for rows = output channels, with the rms of W as its unit."""
    w = weight.detach().double()
    if kind == "nuc":
        return float(torch.linalg.matrix_norm(w, "nuc") / w.norm())
    return float((difference_matrix(len(w), {"d1": 1, "d2": 2}[kind]) @ w).square().sum() / w.square().sum())


@pytest.mark.parametrize("kinds", [("nuc",), ("d1",), ("d2",), ("nuc", "d1"), ("nuc", "d1", "d2")])
@pytest.mark.parametrize(("family", "paths"), [("gpt2", ("attn.c_attn", "mlp.c_fc")), ("opt", ("fc2",))])
def test_the_loss_is_distillation_plus_the_penalty(
    kinds: tuple[Kind, ...],
    family: str,
    paths: tuple[str, ...],
    pico: Callable[..., nn.Module],
    context_of: MakeContext,
) -> None:
    """Several are added up. GPT-2 keeps its weights [in, out]: rows are outputs all the same."""
    context = context_of(pico(family))
    run = run_of(context, dict.fromkeys(paths, tuple(map(Penalty, kinds))), w_lm=0.5, w_kd=2.0)
    plain = DistillRun(Distill(w_lm=0.5, w_kd=2.0), run.emulator, context, run.train, run.validation)
    batch = context.calibration[0]
    blocks = [context.block(i) for i in (1, 2, 3, 4)]
    total = sum(slow_penalty(linear_weight(b.get_submodule(p)), kind) for b in blocks for p in paths for kind in kinds)
    for step, lam in ((0, 0.0), (3, 0.25), (6, 0.5), (19, 0.5)):
        run.step = step
        assert run._loss(batch).item() == pytest.approx(plain._loss(batch).item() + lam * total, rel=1e-5)


def test_the_gradient_reaches_the_penalised_weights_alone(pico_llama: nn.Module, context_of: MakeContext) -> None:
    run = run_of(context_of(pico_llama), {"self_attn.v_proj": (Penalty("nuc"),), "mlp.up_proj": (Penalty("d1"),)})
    run.step = 10
    run.penalty().backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, p in run.student.parameters.items() if p.grad is not None}
    ends = ("self_attn.v_proj.weight", "mlp.up_proj.weight")
    assert with_gradient == {f"emulator.{slot}.{end}" for slot in range(4) for end in ends}
    weight = run.student.parameters["emulator.2.self_attn.v_proj.weight"]
    u, _, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    assert_close(weight.grad, u @ vt / weight.detach().norm(), rtol=1e-4, atol=1e-6)


def test_matrices_are_decomposed_every_ten_steps_and_behind_a_checkpoint(
    pico_llama: nn.Module, context_of: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(context_of(pico_llama), {"self_attn.v_proj": (Penalty("nuc"),)}, steps=26, eval_every=13)
    steps, slope_of = [], smooth_training.nuclear_subgradient

    def noted(weight: Tensor) -> Tensor:
        steps.append(run.step)
        return slope_of(weight)

    monkeypatch.setattr(smooth_training, "nuclear_subgradient", noted)
    run.run()
    # Four blocks each time. At step 0 the penalty's factor is 0, so it begins at 1; there is a checkpoint before 13.
    assert steps == [step for step in (1, 10, 13, 20) for _ in range(4)]


def test_it_measures_what_will_be_handed_out(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    run = run_of(context, {})
    before = {name: p.detach().clone() for name, p in run.student.parameters.items()}
    cut = LowRank(bytes="60000", mode="plain").compress(start(context), context)
    assert run._measure() == pytest.approx(hidden_error(cut, context, context.calibration), rel=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in run.student.parameters.items())


# What comes of it


def text_context(**more: Any) -> Context:
    model, train, validation = trained_llama()
    return Context(model, find_blocks(model), (0, 5), (1, 2, 3, 4), calibration=train, validation=validation, **more)


def scores(built: Emulator, context: Context) -> tuple[float, float]:
    """Nats per token and hidden error on text that nobody saw."""
    text = context.validation
    return evaluate_loss(emulated_network(built, context), text).loss, hidden_error(built, context, text)


@pytest.mark.parametrize("keep", [0.4, 0.64])
def test_smooth_weights_lose_less_when_cut(keep: float) -> None:
    """At equal bytes: better than plain weights, and than weights that were trained as long without the penalty."""
    context = text_context()
    plain = scores(LowRank(keep, "plain").compress(start(context), context), context)
    method = Smooth(keep, steps=120, eval_every=40, lam=0.3, **QUICK)
    built = method.compress(start(context), context)
    unpenalised = scores(replace(method, lam=0.0).compress(start(context), context), context)
    loss, error = scores(built, context)
    assert loss < plain[0] - 0.2 and error < 0.6 * plain[1]
    assert loss < unpenalised[0] - 0.2 and error < 0.6 * unpenalised[1]


@pytest.mark.parametrize("keep", [0.4, pytest.param(0.64, marks=pytest.mark.slow)])
def test_the_defaults_are_strong_enough_to_help(keep: float) -> None:
    """With lr and lam as they are by default: better than plain weights, and than training without the penalty."""
    context = text_context()
    method = Smooth(keep, "train", steps=200)
    loss, error = scores(method.compress(start(context), context), context)
    plain = scores(LowRank(keep, "plain").compress(start(context), context), context)
    unpenalised = scores(replace(method, lam=0.0).compress(start(context), context), context)
    for other in (plain, unpenalised):
        assert loss < other[0] - 0.05 and error < 0.97 * other[1]


def test_it_never_ends_worse_than_plain_weights() -> None:
    """A penalty that ruins the weights: what comes out is the first candidate, the plain truncation."""
    context = text_context()
    ruined = Smooth(0.5, steps=10, eval_every=5, lam=1e4, **(QUICK | {"lr": 0.1})).compress(start(context), context)
    plain = LowRank(0.5, "plain").compress(start(context), context)
    for ours, theirs in zip(ruined.blocks, plain.blocks, strict=True):
        assert_close(ours.module.state_dict(), theirs.module.state_dict())


class Interrupted(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("rank", ["budget", "energy"])
def test_interrupted_and_resumed_equals_at_once(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Smooth(0.5, steps=20, eval_every=7, lam=0.3, rank=rank, **(QUICK | {"mlp": "d2"}))  # type: ignore[arg-type]
    context = text_context()
    at_once = method.compress(start(context), context)
    step_of, steps = SmoothRun._step, []

    def step(self: SmoothRun, number: int) -> float:
        if number == 11 and len(steps) < 12:
            raise Interrupted
        steps.append(number)
        return step_of(self, number)

    monkeypatch.setattr(SmoothRun, "_step", step)
    resumable = text_context(workdir=tmp_path)
    with pytest.raises(Interrupted):
        method.compress(start(resumable), resumable)
    steps.extend([-1])
    resumed = method.compress(start(resumable), resumable)
    assert steps[12:] == list(range(7, 20)), "it goes on at the checkpoint"
    for ours, theirs in zip(resumed.blocks, at_once.blocks, strict=True):
        a, b = ours.module.state_dict(), theirs.module.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_another_penalty_is_another_run(tmp_path: Path) -> None:
    context = text_context(workdir=tmp_path)
    method = Smooth(0.5, steps=2, eval_every=2, lam=0.3, **QUICK)
    for other in (method, replace(method, lam=0.1), replace(method, keep=0.4), replace(method, attention="none")):
        other.compress(start(context), context)
    assert len(list(tmp_path.glob("smooth-*/state.safetensors"))) == 4
