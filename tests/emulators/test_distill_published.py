"""Distillation as the published code did it: its loss, selection by training loss, decay of norms, dropout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators import distill
from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.distill import Distill
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.training import shuffled
from offsite_fl.errors import EmulatorError
from offsite_fl.models.walk import call_block, capture_calls
from tests.conftest import VOCAB
from tests.pico_classifiers import SIDE, make_classifier

from .conftest import dropped, make_context, random_batches, same, weights
from .trained import text_batches

Pico = Callable[..., nn.Module]


def states(context: Context, places: dict[int, nn.Module], batch: Batch) -> tuple[Tensor, Tensor]:
    """What the full middle and ``places`` make of the state that enters block 1, called one by one."""
    calls = capture_calls(context.model, context.blocks, batch)
    assert calls[0].hidden is not None
    t = s = call_block(context.block(0), calls[0].hidden, calls[0]).detach()
    with torch.no_grad():
        for index in (1, 2, 3, 4):
            t = call_block(context.block(index), t, calls[index])
    for position, module in places.items():
        s = call_block(module, s, calls[position])
    return t, s


def published_kd(t: Tensor, s: Tensor) -> Tensor:
    """The published L_KD: the difference in units of one root mean square of the teacher, squared, averaged."""
    rms = t.pow(2).mean().sqrt()
    return ((t - s) / rms).pow(2).mean()


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("w_lm", "w_kd"), [(1.0, 30.0), (0.0, 1.0), (2.0, 0.0)])
def test_the_loss_is_the_published_one(
    pico_llama: nn.Module, pico_batch: Batch, mask: bool, w_lm: float, w_kd: float
) -> None:
    """Over real tokens, or as published over all of them; 3 of the 24 are padding."""
    context = make_context(pico_llama)
    emulator = dropped(context)
    t, s = states(context, {1: context.block(1), 4: context.block(4)}, pico_batch)
    kept = pico_batch["attention_mask"].bool() | (not mask)
    assert kept.sum() == (21 if mask else 24)
    lm = emulated_network(emulator, context)(**pico_batch).loss
    options = Distill(w_lm=w_lm, w_kd=w_kd, mask=mask, select="distill")
    run = distill.DistillRun(options, emulator, context, [pico_batch], [pico_batch])
    kd = published_kd(t[kept], s[kept])
    assert run._loss(pico_batch).item() == pytest.approx((w_lm * lm + w_kd * kd).item(), rel=1e-5)
    assert run._measure() == pytest.approx(kd.item(), rel=1e-5)


def pixel_batch() -> Batch:
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "labels": torch.tensor([0, 2, 1])}


def text_batch() -> Batch:
    ids = torch.randint(4, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2, 1])}


@pytest.mark.parametrize(
    ("given", "language", "images"),
    [
        ({}, (1.0, 30.0), (0.0, 1.0)),
        ({"w_lm": 0.25}, (0.25, 30.0), (0.25, 1.0)),
        ({"w_kd": 2.0}, (1.0, 2.0), (0.0, 2.0)),
        ({"w_lm": 1.0, "w_kd": 30.0}, (1.0, 30.0), (1.0, 30.0)),
        ({"w_lm": 0.0}, (0.0, 30.0), (0.0, 1.0)),
    ],
)
def test_weights_that_are_not_given_are_those_of_the_task(
    given: dict[str, float], language: tuple[float, float], images: tuple[float, float], pico_llama: nn.Module
) -> None:
    """Section 1.5 of the method notes: 1 and 30 for language, 0 and 1 for vision. A text's class is language."""
    for model, adapter, batch, (w_lm, w_kd) in (
        (pico_llama, (0, 5), random_batches(1)[0], language),
        (make_classifier("bert"), (0, 4), text_batch(), language),
        (make_classifier("vit"), (0, 4), pixel_batch(), images),
    ):
        context = make_context(model, adapter)
        emulator = dropped(context)

        def loss(
            options: Distill, context: Context = context, emulator: Emulator = emulator, b: Batch = batch
        ) -> float:
            run = distill.DistillRun(replace(options, select="distill"), emulator, context, [b], [b])
            return run._loss(b).item()

        lm, kd = loss(Distill(w_lm=1.0, w_kd=0.0)), loss(Distill(w_lm=0.0, w_kd=1.0))
        assert lm > 0.1 and kd > 1e-3
        assert loss(Distill(**given)) == pytest.approx(w_lm * lm + w_kd * kd, rel=1e-5)  # type: ignore[arg-type]


def test_images_without_a_loss_are_refused() -> None:
    """By default they have L_KD alone, so without it nothing is left; a language model still has L_LM."""
    images = make_context(make_classifier("vit"), (0, 4), calibration=(pixel_batch(), pixel_batch()))
    with pytest.raises(EmulatorError, match="for images so is w-lm; give w-lm"):
        Distill(steps=1, w_kd=0.0).compress(dropped(images), images)
    text = make_context(make_classifier("bert"), (0, 4), calibration=(text_batch(), text_batch()))
    Distill(steps=1, w_kd=0.0).compress(dropped(text), text)


def test_a_checkpoint_belongs_to_the_weights_that_were_used(tmp_path: Path) -> None:
    """Without weights it is that of a run with the task's own."""
    for kind, batch, given in (("bert", text_batch(), (1.0, 30.0)), ("vit", pixel_batch(), (0.0, 1.0))):
        context = make_context(make_classifier(kind), (0, 4), calibration=(batch, batch), workdir=tmp_path / kind)
        for method in (Distill(steps=1), Distill(1, w_lm=given[0], w_kd=given[1]), Distill(1, w_lm=2.0)):
            method.compress(dropped(context), context)
        assert len(list((tmp_path / kind).rglob("state.safetensors"))) == 2


def test_unmasked_padding_counts(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = make_context(pico_llama)
    both = []
    for mask in (True, False):
        options = Distill(w_lm=0.0, mask=mask, select="distill")
        both.append(distill.DistillRun(options, dropped(context), context, [pico_batch], [pico_batch])._measure())
    assert abs(both[0] - both[1]) > 1e-3


def plain_training(
    context: Context, steps: int, accumulate: int, lr: float, decay: float, decayed: Callable[[str], bool]
) -> tuple[list[float], list[list[Tensor]]]:
    """L_KD of every batch and the weights after every step, of blocks 1 and 4 trained towards the full middle."""
    blocks = {index: copy.deepcopy(context.block(index)) for index in (1, 4)}
    named = [(name, p) for block in blocks.values() for name, p in block.named_parameters()]
    groups = [
        {"params": [p for name, p in named if decayed(name)], "weight_decay": decay},
        {"params": [p for name, p in named if not decayed(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
    count = len(context.calibration)
    order = [i for epoch in range(9) for i in shuffled(count, context.seed, epoch)]
    losses, weights_after = [], []
    for step in range(steps):
        batches = [context.calibration[i] for i in order[step * accumulate : (step + 1) * accumulate]]
        parts = [published_kd(*states(context, dict(blocks), batch)) for batch in batches]
        losses += [part.item() for part in parts]
        optimizer.zero_grad()
        torch.stack(parts).mean().backward()
        optimizer.step()
        weights_after.append([p.detach().clone() for _, p in named])
    return losses, weights_after


# A rate of 1e-3 lowers the loss all the way, one of 0.3 raises it from the second step on.
@pytest.mark.parametrize(("lr", "best"), [(1e-3, 2), (0.3, 0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_selection_by_training_loss(pico_llama: nn.Module, lr: float, best: int, accumulate: int) -> None:
    """Six steps in three intervals: the weights at the end of that with the lowest mean L_KD, never the start's."""
    context = make_context(pico_llama, calibration=text_batches(4))
    method = Distill(
        steps=6, lr=lr, w_lm=0.0, w_kd=1.0, warmup_steps=0, schedule="constant", clip=0.0, eval_every=2,
        select="train", accumulate=accumulate,
    )  # fmt: skip
    tuned = method.compress(dropped(context), context)
    losses, after = plain_training(context, 6, accumulate, lr, 0.0, lambda _: False)
    size = 2 * accumulate
    means = [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]
    assert len(means) == 3 and min(range(3), key=means.__getitem__) == best
    # A step moves a weight by about the rate, so this tells one step from the next.
    assert_close(weights(tuned), after[2 * best + 1], rtol=1e-3, atol=1e-4 + lr / 100)
    assert not same(weights(tuned), weights(dropped(context)))


def test_the_training_loss_is_that_since_the_last_candidate(pico_llama: nn.Module, pico_batch: Batch) -> None:
    """Nothing yet, then 3 and 1, then 4: infinite, 2, 4."""
    context = make_context(pico_llama)
    run = distill.DistillRun(Distill(select="train"), dropped(context), context, [pico_batch], [])
    seen = [run._measure()]
    for losses in ([3.0, 1.0], [4.0]):
        run.interval.extend(losses)
        seen.append(run._measure())
    assert seen == [math.inf, 2.0, 4.0]


def test_selection_by_training_loss_needs_no_other_text(
    pico_llama: nn.Module, pico_batch: Batch, counted: dict[str, int]
) -> None:
    context = make_context(pico_llama, calibration=(pico_batch,))
    Distill(steps=3, w_lm=0.0, select="train", eval_every=2).compress(dropped(context), context)
    assert counted["teacher"] == 3, "once a step, and never to measure"


@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decay_of_norms_as_published(pico: Pico, family: str, decay_norms: bool) -> None:
    """With it everything decays but biases, without it matrices only; a decay of 20 % a step shows."""
    context = make_context(pico(family), calibration=text_batches(2))
    matrices = {name for name, p in context.block(1).named_parameters() if p.ndim == 2}
    others = {name for name, _ in context.block(1).named_parameters()} - matrices
    norms = {name for name in others if not name.endswith("bias")}
    assert norms and (family == "llama" or others > norms)
    method = Distill(
        steps=3, lr=0.01, w_lm=0.0, w_kd=1.0, warmup_steps=0, schedule="constant", clip=0.0, eval_every=3,
        select="train", weight_decay=20.0, decay_norms=decay_norms,
    )  # fmt: skip
    tuned = method.compress(dropped(context), context)
    decayed = matrices | (norms if decay_norms else set())
    _, after = plain_training(context, 3, 1, 0.01, 20.0, decayed.__contains__)
    # Adam makes full steps of rounding errors where the gradient is 0: no loss depends on the bias of keys.
    names = 2 * [name for name, _ in context.block(1).named_parameters()]
    compared = [i for i, name in enumerate(names) if name != "attn.c_attn.bias"]
    assert_close([weights(tuned)[i] for i in compared], [after[-1][i] for i in compared], rtol=1e-3, atol=1e-4)


def test_dropout_as_published(pico: Pico, pico_batch: Batch) -> None:
    """Where every residual is dropped, the student's blocks do nothing; the teacher drops nothing."""
    context = make_context(pico("gpt2", resid_pdrop=1.0, embd_pdrop=0.0, attn_pdrop=0.0), calibration=(pico_batch,))
    calls = capture_calls(context.model, context.blocks, pico_batch)
    entering = calls[0].hidden
    assert entering is not None
    t = entering
    for index in (1, 2, 3, 4):
        t = call_block(context.block(index), t, calls[index])
    kept = pico_batch["attention_mask"].bool()
    run = distill.DistillRun(Distill(w_lm=0.0, dropout=True), dropped(context), context, [pico_batch], [pico_batch])
    run._step(0)
    assert run.interval == [pytest.approx(published_kd(t[kept], entering[kept]).item(), rel=1e-5)]
    assert not any(module.training for module in run.student.network.modules()), "measured without dropout"


def test_dropout_follows_from_seed_and_step(pico: Pico, pico_batch: Batch) -> None:
    context = make_context(pico("gpt2", resid_pdrop=0.3), calibration=(pico_batch,))

    def losses(seed: int, steps: tuple[int, ...]) -> list[float]:
        now = replace(context, seed=seed)
        options = Distill(w_lm=0.0, lr=1e-9, dropout=True, accumulate=2)
        run = distill.DistillRun(options, dropped(now), now, [pico_batch], [pico_batch])
        for step in steps:
            torch.rand(step + 5)  # what else is random mustn't matter
            run._step(step)
        return run.interval

    state = torch.get_rng_state()
    once = losses(0, (0, 1))
    assert len({round(loss, 5) for loss in once}) == 4, "every batch drops others"
    assert torch.equal(torch.tensor(losses(0, (1,))), torch.tensor(once[2:]))
    assert losses(1, (0,)) != once[:2]
    torch.set_rng_state(state)
    losses(0, ())
    run = distill.DistillRun(Distill(dropout=True), dropped(context), context, [pico_batch], [pico_batch])
    run._step(0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on as they would have"
