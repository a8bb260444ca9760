"""The loss margin: what is measured, that the loss ends where it should, and that it never ends farther off."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators import loss_margin
from offsite_fl.emulators.base import Batch, Context, Emulator, start
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.loss_margin import LossMargin, sequence_losses, with_prompt
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.blocks import find_blocks

from .trained import trained_llama

MakeContext = Callable[..., Context]
FAST: dict[str, Any] = {"steps": 4, "eval_every": 2, "lr": 1e-3}


def weights(emulator: Emulator) -> list[Tensor]:
    return [p for block in emulator.blocks for p in block.module.parameters()]


def same(a: Emulator, b: Emulator) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def run_of(method: LossMargin, emulator: Emulator, context: Context) -> Any:
    return loss_margin._Run(method, emulator, context, list(context.calibration), list(context.validation))


# What is measured


def test_losses_of_sequences_by_hand(pico_llama: nn.Module, pico_batch: Batch) -> None:
    """Cross entropy of all logits, token by token; the second row predicts 8 tokens, the first 11."""
    logits = pico_llama(input_ids=pico_batch["input_ids"], attention_mask=pico_batch["attention_mask"]).logits
    expected = []
    for row, count in ((0, 11), (1, 8)):
        chances = logits[row].log_softmax(-1)
        expected.append(-sum(chances[t, pico_batch["input_ids"][row, t + 1]] for t in range(count)) / count)
    assert_close(sequence_losses(pico_llama, pico_batch), torch.stack(expected))


def test_a_sequence_without_a_target_counts_for_nothing(pico_llama: nn.Module, pico_batch: Batch) -> None:
    batch = {**pico_batch, "labels": pico_batch["labels"].clone()}
    batch["labels"][0] = -100
    assert len(sequence_losses(pico_llama, batch)) == 1
    batch["labels"][1] = -100
    assert len(sequence_losses(pico_llama, batch)) == 0


def test_without_a_prompt_embeddings_are_the_same_text(
    family: str, pico: Callable[..., nn.Module], pico_batch: Batch
) -> None:
    model = pico(family)
    embedded = with_prompt(pico_batch, model, 0, 1.0, "embedding", 3)
    assert embedded["inputs_embeds"].shape == (2, 12, 32)
    assert_close(sequence_losses(model, embedded), sequence_losses(model, pico_batch), rtol=1e-5, atol=1e-5)


def test_the_prompt_stands_in_front_and_only_the_text_counts(pico_llama: nn.Module, pico_batch: Batch) -> None:
    """12 tokens become 3 random vectors and 9 tokens, of which the first isn't predicted: targets are tokens 1..8."""
    prompted = with_prompt(pico_batch, pico_llama, 3, 1.0, "embedding", 3)
    ids = pico_batch["input_ids"]
    text = pico_llama.get_input_embeddings()(ids[:, :9])  # type: ignore[operator]
    assert_close(prompted["inputs_embeds"][:, 3:], text)
    assert prompted["labels"].tolist() == [[-100] * 4 + row[1:9] for row in ids.tolist()]
    assert bool(prompted["attention_mask"].all())
    assert torch.equal(ids, pico_batch["input_ids"])
    again, other = (with_prompt(pico_batch, pico_llama, 3, 1.0, "embedding", seed) for seed in (3, 4))
    assert torch.equal(again["inputs_embeds"], prompted["inputs_embeds"])
    assert not torch.equal(other["inputs_embeds"][:, :3], prompted["inputs_embeds"][:, :3])
    assert not torch.equal(prompted["inputs_embeds"][0, :3], prompted["inputs_embeds"][1, :3])


@pytest.mark.parametrize(("unit", "scale"), [("embedding", 2.0), ("absolute", 20.0)])
def test_the_size_of_the_prompt(unit: str, scale: float, pico_llama: nn.Module) -> None:
    ids = torch.randint(4, 64, (64, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    drawn = with_prompt(batch, pico_llama, 20, scale, unit, 0)["inputs_embeds"][:, :20]
    text = pico_llama.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    expected = scale * (float(text.std()) if unit == "embedding" else 1.0)
    assert float(drawn.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(drawn.mean())) < 0.02 * expected


def test_the_objective_of_an_uncompressed_middle_is_the_margin(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext, batches: tuple[Batch, ...]
) -> None:
    """Both models see the same prompts, so L_E = L_M and |L_E - L_M - H| = H, on any text and at any step."""
    context = context_of(pico(family), validation=batches[:2])
    for options in ({"prompt": 5}, {"prompt": 0}, {"prompt": 2, "scale": 20.0, "unit": "absolute"}):
        run = run_of(LossMargin(margin=0.7, **options), start(context), context)  # type: ignore[arg-type]
        assert run._measure() == pytest.approx(0.7, abs=1e-4)
        assert run._loss(batches[1]).item() == pytest.approx(0.7, abs=1e-4)


def test_the_objective_by_hand(pico_llama: nn.Module, context_of: MakeContext, batches: tuple[Batch, ...]) -> None:
    context = context_of(pico_llama, validation=batches[:2])
    emulator = LayerDrop(2).compress(start(context), context)
    method = LossMargin(margin=0.5, prompt=0)
    gaps = [
        (sequence_losses(emulated_network(emulator, context), b) - sequence_losses(pico_llama, b)).tolist()
        for b in batches[:2]
    ]
    expected = [abs(gap - 0.5) for part in gaps for gap in part]
    assert run_of(method, emulator, context)._measure() == pytest.approx(sum(expected) / 8, rel=1e-4)


# What comes of it


def trained_context() -> Context:
    model, text, unseen = trained_llama()
    return Context(model, find_blocks(model), (0, 5), (1, 2, 3, 4), calibration=text, validation=unseen)


def losses(emulator: Emulator, context: Context) -> float:
    return evaluate_loss(emulated_network(emulator, context), context.validation).loss


def cosine_of(emulator: Emulator, context: Context) -> float:
    full = full_gradients(context, context.validation)
    return match_gradients(emulator_gradients(emulator, context, context.validation), full).cosine


@functools.cache
def raised(margin: float) -> Emulator:
    context = trained_context()
    return LossMargin(margin=margin, steps=50, lr=5e-4, eval_every=10).compress(start(context), context)


@pytest.mark.parametrize(("margin", "direction"), [(0.5, 0.5), (1.0, 0.2)])
def test_the_loss_ends_at_the_margin_and_gradients_still_point_down(margin: float, direction: float) -> None:
    """On text that no step saw; by its own measure it began at the margin itself."""
    context = trained_context()
    built = raised(margin)
    loss, goal = losses(built, context), evaluate_loss(context.model, context.validation).loss
    assert loss - goal == pytest.approx(margin, abs=0.25 * margin)
    assert run_of(LossMargin(margin=margin), built, context)._measure() < 0.5 * margin
    cosine = cosine_of(built, context)
    assert cosine > direction
    (note,) = built.notes
    assert f"asked for: {margin:+g}" in note and f"{loss:.2f}, {loss - goal:+.2f}" in note
    assert f"cosine {cosine:.3f} with the full model's, 1.000 before" in note


def test_the_direction_of_gradients_is_kept_better_than_by_noise_on_the_weights() -> None:
    """Against noise on all weights of the same blocks that raises the loss by as much."""
    context = trained_context()
    built = raised(0.5)

    def noisy(size: float) -> Emulator:
        generator = torch.Generator().manual_seed(0)
        emulator = start(context)
        for block in emulator.blocks:
            block.module = copy.deepcopy(block.module)
            for p in block.module.parameters():
                noise = torch.randn(p.shape, generator=generator) * p.detach().std()
                p.data.add_(noise * size)
        return emulator

    size = next(s for s in (0.05 * 1.3**k for k in range(20)) if losses(noisy(s), context) >= losses(built, context))
    assert cosine_of(built, context) > cosine_of(noisy(size), context)


def test_the_owner_is_left_alone() -> None:
    context = trained_context()
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    context.model.train()
    built = LossMargin(margin=1.0, **FAST).compress(start(context), context)
    assert all(module.training for module in context.model.modules())
    context.model.eval()
    assert not same(built, start(context))
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in context.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.model.modules())


def test_a_rate_that_ruins_it_gives_back_what_came_in() -> None:
    context = trained_context()
    built = LossMargin(margin=0.1, steps=3, lr=3.0, eval_every=1).compress(start(context), context)
    assert same(built, start(context))


def test_no_margin_on_an_uncompressed_middle_changes_nothing() -> None:
    context = trained_context()
    built = LossMargin(margin=0, **FAST).compress(start(context), context)
    assert losses(built, context) == pytest.approx(losses(start(context), context), abs=1e-4)
    assert "cosine 1.000" in built.notes[0]


def test_every_family(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext, batches: tuple[Batch, ...]
) -> None:
    context = context_of(pico(family), validation=batches[:1])
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    method = LossMargin(margin=1.0, **FAST)
    assert parse_emulator(str(method)) == method
    built = (LayerDrop(2) + method).compress(start(context), context)
    assert built.positions == (1, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert bool(torch.isfinite(logits).all())
    owned = {p.data_ptr() for p in context.model.parameters()}
    assert not owned & {p.data_ptr() for p in weights(built)}


@pytest.mark.parametrize("before", ["scaleot:alpha=0.5,rank-keep=0.3,steps=2,rank=4", "low-rank:keep=0.5,mode=plain"])
def test_behind_other_methods(before: str) -> None:
    context = trained_context()
    given = parse_emulator(before).compress(start(context), context)
    margin = losses(given, context) - losses(start(context), context) + 1.0
    built = LossMargin(margin=margin, **FAST).compress(given, context)
    assert not same(built, given) and losses(built, context) > losses(given, context)
    assert [p.dtype for p in weights(built)] == [p.dtype for p in weights(given)]


def test_half_precision_comes_back_in_half_precision(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.to(torch.bfloat16))
    built = LossMargin(margin=2.0, steps=4, eval_every=2, lr=1e-2).compress(start(context), context)
    assert {p.dtype for p in weights(built)} == {torch.bfloat16}
    assert not same(built, start(context))


class Interrupted(Exception):
    """Stands for a killed process."""


def test_interrupted_and_resumed_equals_at_once(
    pico_llama: nn.Module, context_of: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts follow from the number of the step, so a resumed run draws the same ones."""
    context = context_of(pico_llama)
    method = LossMargin(margin=1.0, steps=6, eval_every=2, lr=1e-3)
    at_once = method.compress(start(context), context)
    steps: list[int] = []
    step_of = loss_margin._Run._step

    def step(self: Any, number: int) -> float:
        steps.append(number)
        if len(steps) == 4:
            raise Interrupted
        return step_of(self, number)

    monkeypatch.setattr(loss_margin._Run, "_step", step)
    resumable = replace(context, workdir=tmp_path)
    with pytest.raises(Interrupted):
        method.compress(start(context), resumable)
    assert same(method.compress(start(context), resumable), at_once)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    assert not same(method.compress(start(context), replace(context, seed=1)), at_once)


# Settings and refusals


def test_quantised_weights_are_refused(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=r"loss-margin: .* weights already.*as in 'loss-margin\+quantize'"):
        parse_emulator("quantize+loss-margin").compress(start(context), context)


def test_text_is_needed(pico_llama: nn.Module, context_of: MakeContext, batches: tuple[Batch, ...]) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="loss-margin needs calibration text"):
        LossMargin().compress(start(context), context)
    context = context_of(pico_llama, calibration=batches[:1])
    with pytest.raises(EmulatorError, match="loss-margin chooses its result on text"):
        LossMargin().compress(start(context), context)
    with pytest.raises(EmulatorError, match="a prompt of 15 leaves nothing to predict of 16 tokens"):
        LossMargin(prompt=15).compress(start(context), replace(context, calibration=batches))


def test_a_loss_that_is_not_a_number_stops_the_run(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=r"loss-margin: the loss isn't finite at step \d+; try a smaller lr"):
        LossMargin(lr=1e30, steps=8, eval_every=8).compress(start(context), context)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"margin": -1.0}, "margin"),
        ({"steps": 0}, "steps"),
        ({"eval_every": 0}, "eval_every"),
        ({"lr": 0.0}, "lr"),
        ({"prompt": -1}, "prompt"),
        ({"scale": -1.0}, "scale"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LossMargin(**options)


def test_the_spec() -> None:
    spec = "layer-drop:keep=2+loss-margin:margin=2.0,lr=2e-06,scale=20.0,unit=absolute+quantize"
    assert str(parse_emulator(spec)) == spec
    assert LossMargin().margin == 4.0 and math.isclose(LossMargin(steps=10, lr=1.0).rate(9), 0.1)
