"""Distillation: what it computes and what it doesn't, what it changes and what it leaves, what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.distill import Distill, hold_out, relative_error
from offsite_fl.emulators.quantize import Quantize
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.emulators.student import Student, Teacher
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.evaluation.loss import causal_nll, evaluating
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.linears import LowRankLinear, replace_module
from offsite_fl.models.walk import call_block, capture_calls

from .conftest import dropped, make_context, same, untouched, weights
from .trained import text_batches, trained_llama

Pico = Callable[..., nn.Module]


def measured(emulator: Emulator, context: Context, batches: tuple[Batch, ...]) -> tuple[float, float]:
    """Nats per token and hidden error of an emulator."""
    student, teacher = Student(emulator, context), Teacher(context)
    nats = tokens = error = size = 0.0
    with torch.no_grad():
        for batch in batches:
            h, s, loss, count = student.forward(batch, with_loss=True)
            part = relative_error(teacher.forward(batch, h), s, batch["attention_mask"])
            assert loss is not None
            nats, tokens = nats + loss.item(), tokens + count
            error, size = error + part[0].item(), size + part[1].item()
    return nats / tokens, error / size


# The loss


def test_relative_error_by_hand() -> None:
    """Kept tokens: T = (3, 4) and (0, 5), S = (3, 2) and (1, 5); 4 + 1 over 25 + 25. The third is padding."""
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [7.0, 7.0]]])
    student = torch.tensor([[[3.0, 2.0], [1.0, 5.0], [0.0, 0.0]]])
    error, size = relative_error(teacher, student, torch.tensor([[1, 1, 0]]))
    assert (error.item(), size.item()) == (5.0, 50.0)
    scaled, scale = relative_error(teacher.half() * 100, student.half() * 100, torch.tensor([[1, 1, 0]]))
    assert scaled.dtype == torch.float32
    assert scaled / scale == error / size


def check_no_error(model: nn.Module, adapter: tuple[int, ...], batch: Batch) -> None:
    middle = tuple(i for i in range(6) if i not in adapter)
    context = Context(model, find_blocks(model), adapter, middle)
    entering, state, nats, tokens = Student(start(context), context).forward(batch, with_loss=True)
    goal = Teacher(context).forward(batch, entering)
    kept = batch["attention_mask"].bool()
    assert_close(state[kept].detach(), goal[kept])
    assert nats is not None
    with evaluating(model):
        assert_close(nats.detach(), causal_nll(model, batch)[0].detach())
    assert tokens == 11 + 8


def test_the_uncompressed_middle_has_no_error(pico: Pico, family: str, pico_batch: Batch) -> None:
    """In any family, with an adapter block inside the middle, and with dropout in the model, whose mode stays."""
    model = pico(family).train()
    check_no_error(model, (0, 3, 5), pico_batch)
    assert model.training


@pytest.mark.parametrize("adapter", [(0, 5), (5,), (0,), (2,)])
def test_the_uncompressed_middle_has_no_error_in_any_split(
    pico_llama: nn.Module, adapter: tuple[int, ...], pico_batch: Batch
) -> None:
    check_no_error(pico_llama, adapter, pico_batch)


def test_both_sides_of_a_middle_with_adapter_blocks_inside(pico_llama: nn.Module, pico_batch: Batch) -> None:
    """Adapter 0, 3, 5; the emulator lost block 1, where both sides start: S = 2, 3, 4 and T = 1, 2, 3, 4 on h."""
    context = Context(pico_llama, find_blocks(pico_llama), (0, 3, 5), (1, 2, 4))
    own = [copy.deepcopy(context.block(i)) for i in (2, 4)]
    with torch.no_grad():
        for module in own:
            for parameter in module.parameters():
                parameter.mul_(1.1)
    emulator = Emulator([EmulatorBlock(own[0], 2), EmulatorBlock(own[1], 4)], {2: 0, 4: 1})
    calls = capture_calls(pico_llama, context.blocks, pico_batch)
    assert calls[0].hidden is not None
    h = call_block(context.block(0), calls[0].hidden, calls[0])
    t = s = h
    for position in (1, 2, 3, 4):
        t = call_block(context.block(position), t, calls[position])
    for position, module in ((2, own[0]), (3, context.block(3)), (4, own[1])):
        s = call_block(module, s, calls[position])
    entering, state, _, _ = Student(emulator, context).forward(pico_batch, with_loss=False)
    assert_close(entering, h.detach())
    assert_close(state.detach(), s.detach())
    assert_close(Teacher(context).forward(pico_batch, entering), t.detach())


def test_padding_changes_nothing(pico_llama: nn.Module, pico_batch: Batch) -> None:
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wide = {k: nn.functional.pad(v, (0, 7), value=pad[k]) for k, v in pico_batch.items()}
    context = make_context(pico_llama)
    assert_close(*(torch.tensor(measured(dropped(context), context, (b,))) for b in (pico_batch, wide)))


# What is computed, and what isn't


def test_a_loss_of_weight_zero_is_not_computed(pico_llama: nn.Module, counted: dict[str, int]) -> None:
    batches = text_batches(3)
    context = make_context(pico_llama, calibration=batches, validation=batches[:1])
    ran: list[int] = []
    hooks = [context.block(i).register_forward_hook(lambda *_: ran.append(1)) for i in range(6)]
    base = Distill(steps=4, eval_every=4)
    replace(base, w_kd=0.0).compress(dropped(context), context)
    assert (counted["teacher"], counted["loss"], len(ran)) == (0, 4, 0), "no block of the full model may run"
    replace(base, w_lm=0.0, select="distill").compress(dropped(context), context)
    # 4 steps and a measurement at the start and at the end; the teacher stops behind block 4, so block 5 never runs.
    assert (counted["teacher"], counted["loss"], len(ran)) == (6, 4, 6 * 5)
    base.compress(dropped(context), context)
    assert (counted["teacher"], counted["loss"]) == (10, 8)
    for hook in hooks:
        hook.remove()


def test_without_the_lm_loss_nothing_behind_the_middle_runs(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = make_context(pico_llama)
    student = Student(dropped(context), context)
    ran: list[str] = []
    for name, module in student.network.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    student.forward(pico_batch, with_loss=False)
    assert "model.layers.2.mlp" in ran, "the last emulator block"
    assert not {"model.layers.3", "model.norm", "lm_head"} & set(ran)


def test_only_emulator_weights_train_and_only_matrices_decay(pico: Pico, family: str) -> None:
    context = make_context(pico(family))
    student = Student(dropped(context), context)
    learning = {name for name, p in student.network.named_parameters() if p.requires_grad}
    block = dict(context.block(1).named_parameters())
    assert set(student.parameters) == {f"emulator.{slot}.{path}" for slot in (0, 1) for path in block}
    assert len(learning) == len(student.parameters)
    matrices = {path for path, p in block.items() if p.ndim == 2}
    assert student.decayed == {f"emulator.{slot}.{path}" for slot in (0, 1) for path in matrices}
    assert not any("norm" in name or "ln_" in name or name.endswith("bias") for name in student.decayed)


# What comes of it


def test_it_lowers_hidden_error_and_perplexity_and_leaves_the_owner_alone() -> None:
    model, train, validation = trained_llama()
    model = copy.deepcopy(model).train()
    context = make_context(model, calibration=train, validation=validation)
    emulator = dropped(context)
    incoming = weights(emulator)
    with untouched(model):
        tuned = Distill(steps=40, lr=2e-3, eval_every=20).compress(emulator, context)
    loss, error = measured(emulator, context, validation)
    new_loss, new_error = measured(tuned, context, validation)
    assert new_error < 0.8 * error
    assert new_loss < loss - 0.1
    assert same(weights(emulator), incoming)
    owned = {p.data_ptr() for p in model.parameters()}
    assert not owned & {p.data_ptr() for block in tuned.blocks for p in block.module.parameters()}


def test_the_better_loss_alone_is_not_enough_to_be_chosen() -> None:
    """A rate that ruins the emulator: it comes back as it came in, by either measure."""
    model, train, validation = trained_llama()
    context = make_context(model, calibration=train, validation=validation)
    emulator = dropped(context)
    for select in ("perplexity", "distill"):
        method = Distill(steps=4, lr=3.0, warmup=0.0, eval_every=1, clip=0.0, select=select)  # type: ignore[arg-type]
        assert same(weights(method.compress(emulator, context)), weights(emulator))


def test_shared_blocks_stay_shared() -> None:
    model, batches, _ = trained_llama()
    context = make_context(model, calibration=batches)
    shared = Emulator([EmulatorBlock(context.block(2), 2), EmulatorBlock(context.block(4), 4)], {1: 0, 2: 0, 4: 1})
    tuned = Distill(steps=8, lr=1e-3, eval_every=4).compress(shared, context)
    assert tuned.layout == shared.layout
    assert [block.origin for block in tuned.blocks] == [2, 4]
    assert tuned.at(1) is tuned.at(2)
    assert not same(weights(tuned), weights(shared))
    student = Student(shared, context)
    student.forward(batches[0], with_loss=False)[1].square().mean().backward()
    gradient = student.parameters["emulator.0.mlp.up_proj.weight"].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_low_rank_factors_train(pico_llama: nn.Module) -> None:
    context = make_context(pico_llama, calibration=text_batches(11))
    blocks = []
    for index in context.middle:
        block = copy.deepcopy(context.block(index))
        u, s, v = torch.linalg.svd(block.get_submodule("mlp.up_proj").weight.detach())  # type: ignore[arg-type]
        factors = u[:, :4] * s[:4], v[:4]
        replace_module(block, "mlp.up_proj", LowRankLinear.from_factors(*factors, None))
        blocks.append(EmulatorBlock(block, index))
    emulator = Emulator(blocks, {index: slot for slot, index in enumerate(context.middle)})
    tuned = Distill(steps=10, lr=1e-3, w_lm=0.0, eval_every=5, select="distill").compress(emulator, context)
    factors = [e.at(2).get_submodule("mlp.up_proj.down").weight for e in (emulator, tuned)]
    assert not torch.equal(*factors)  # type: ignore[arg-type]
    assert measured(tuned, context, context.calibration)[1] < measured(emulator, context, context.calibration)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_in_half_precision(pico_llama: nn.Module, dtype: torch.dtype) -> None:
    context = make_context(pico_llama.to(dtype), calibration=text_batches(11))
    emulator = dropped(context)
    student = Student(emulator, context)
    assert {p.dtype for p in student.parameters.values()} == {torch.float32}
    tuned = Distill(steps=6, lr=3e-3, eval_every=3).compress(emulator, context)
    assert {p.dtype for p in weights(tuned)} == {dtype}
    assert not same(weights(tuned), weights(emulator))
    assert measured(tuned, context, context.calibration)[0] < measured(emulator, context, context.calibration)[0]


# Settings and refusals


def test_the_rate_rises_and_falls() -> None:
    method = Distill(steps=10, lr=1.0, warmup=0.2)
    assert method.rate(0) == 0.5
    assert method.rate(1) == method.rate(2) == 1.0
    assert method.rate(6) == pytest.approx(0.5)
    assert method.rate(9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert Distill(steps=10, lr=1.0, warmup=0.0, schedule="constant").rate(9) == 1.0


def test_warm_up_in_steps() -> None:
    """Four steps up, then a cosine over the other six; or a rise that the run never ends, as in vision."""
    method = Distill(steps=10, lr=1.0, warmup=0.5, warmup_steps=4)
    assert [method.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert method.rate(7) == pytest.approx(0.5)
    assert Distill(steps=10, lr=1.0, warmup_steps=0).rate(0) == 1.0
    assert [Distill(steps=10, lr=1.0, warmup_steps=20).rate(step) for step in (0, 9)] == [0.05, 0.5]


def test_held_out_text_is_never_trained_on(pico_llama: nn.Module) -> None:
    batches = text_batches(11)
    train, held = hold_out(batches, make_context(pico_llama, calibration=batches))
    assert len(train) + len(held) == len(batches)
    assert len(held) == 1
    assert not {id(b) for b in train} & {id(b) for b in held}
    given = make_context(pico_llama, calibration=batches, validation=batches[:2])
    assert [len(part) for part in hold_out(batches, given)] == [len(batches), 2]
    with pytest.raises(EmulatorError, match="at least two batches"):
        hold_out(batches[:1], make_context(pico_llama, calibration=batches[:1]))


def test_without_calibration_text_it_says_so(pico_llama: nn.Module) -> None:
    context = make_context(pico_llama)
    with pytest.raises(EmulatorError, match="distill needs calibration text"):
        Distill().compress(dropped(context), context)


def test_quantised_weights_are_refused(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = make_context(pico_llama, calibration=(pico_batch, pico_batch))
    with pytest.raises(EmulatorError, match="put quantize last"):
        (Quantize() + Distill(steps=1)).compress(dropped(context), context)


def test_a_loss_that_is_not_a_number_stops_the_run(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = make_context(pico_llama, calibration=(pico_batch, pico_batch))
    with pytest.raises(EmulatorError, match=r"isn't finite at step \d+; try a smaller lr than 1e\+30"):
        Distill(steps=5, lr=1e30, warmup=0.0, clip=0.0, eval_every=5).compress(dropped(context), context)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"w_lm": -1.0}, "w_lm"),
        ({"w_lm": 0.0, "w_kd": 0.0}, "all 0"),
        ({"w_grad": -1.0}, "w_grad"),
        ({"warmup": 5.0}, "share"),
        ({"eval_every": 0}, "eval_every"),
        ({"accumulate": 0}, "accumulate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"select": "train", "w_kd": 0.0}, "w-kd must be above 0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Distill(**options)


def test_the_spec(pico_llama: nn.Module) -> None:
    spec = "layer-drop:keep=2+distill:steps=300,lr=0.0005,w-lm=0.0,eval-every=100,select=distill+quantize"
    assert str(parse_emulator(spec)) == spec
    with pytest.raises(ConfigError, match="perplexity"):
        parse_emulator("distill:select=ppl")
    legacy = "distill:select=train,accumulate=8,warmup-steps=250,mask=false,dropout=true,decay-norms=true"
    assert str(parse_emulator(legacy)) == legacy
    assert parse_emulator("distill:warmup-steps=") == Distill()


def test_progress_is_shown_when_asked_for(
    pico_llama: nn.Module, pico_batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = make_context(pico_llama, calibration=(pico_batch, pico_batch))
    method = Distill(steps=2, eval_every=2)
    method.compress(dropped(context), context)
    assert capsys.readouterr().out == ""
    method.compress(dropped(context), replace(context, progress=True))
    assert "2/2" in capsys.readouterr().out
