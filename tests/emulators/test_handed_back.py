"""The loss on what the middle hands back: by hand, against difference quotients, and what training by it does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators import distill
from offsite_fl.emulators.base import Batch, Context, Emulator, start
from offsite_fl.emulators.distill import Distill, DistillRun
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.handed_back import FullMiddle, Handed, handed_back_error
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import EmulatorError
from offsite_fl.models.blocks import find_blocks
from tests.emulators.conftest import random_batches
from tests.emulators.trained import trained_llama

Pico = Callable[..., nn.Module]
MakeContext = Callable[..., Context]
# Nothing but the new loss, at a rate that doesn't change.
ALONE: dict[str, Any] = {"w_lm": 0.0, "w_kd": 0.0, "warmup": 0.0, "schedule": "constant", "select": "distill"}


def dropped(context: Context, keep: int = 2) -> Emulator:
    return LayerDrop(keep).compress(start(context), context)


def weights(emulator: Emulator) -> list[Tensor]:
    return [p.detach() for block in emulator.blocks for p in block.module.parameters()]


def same(a: Emulator, b: Emulator) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def run_of(options: Distill, emulator: Emulator, context: Context) -> DistillRun:
    batches = list(context.calibration)
    return DistillRun(options, emulator, context, batches, batches)


# The loss


def test_linear_maps_by_hand() -> None:
    """``s = E h`` hands back ``E' v``: with v = (1, 2) that of the first token is (1 + 6, 2 + 8) = (7, 10).

    The full model hands back (7, 8) and, at the second token, (0, 1) where the emulator's is (1, 2); the third is
    padding. So the errors are 0 + 4 and 1 + 1, the sizes 49 + 64 and 1: 6 / 114.
    """
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    h = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arriving = torch.tensor([[[1.0, 2.0], [1.0, 0.0], [5.0, 5.0]]])
    full = Handed(arriving, torch.tensor([[[7.0, 8.0], [0.0, 1.0], [9.0, 9.0]]]))
    error = handed_back_error(full, h, h @ matrix.T, torch.tensor([[1, 1, 0]]))
    assert error.item() == pytest.approx(6 / 114)
    # d/dE of |E'v - g|^2 is 2 v (E'v - g)': of the first token 2 (1, 2)(0, 2), of the second 2 (1, 0)(1, 1).
    error.backward()  # type: ignore[no-untyped-call]
    assert matrix.grad is not None
    assert_close(matrix.grad, torch.tensor([[2.0, 6.0], [0.0, 8.0]]) / 114)


def test_nothing_handed_back_on_both_sides_is_no_error() -> None:
    h = torch.ones(1, 1, 2, requires_grad=True)
    zero = torch.zeros(1, 1, 2)
    assert handed_back_error(Handed(zero, zero), h, 2 * h, torch.ones(1, 1)).item() == 0


def states_between(model: nn.Module, batch: Batch, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The state in front of block ``first``, and the loss's gradients behind block ``last`` and in front of the first.

    By adding zeros to the states of the model's own forward pass; the loss is that of transformers, times its tokens.
    """
    inner: Any = model
    zeros: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    tokens = int((batch["labels"][:, 1:] != -100).sum())

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        seen["h"], zeros["in"] = h.detach(), torch.zeros_like(h, requires_grad=True)
        h = h + zeros["in"]
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    def behind(_: nn.Module, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        zeros["out"] = torch.zeros_like(state, requires_grad=True)
        return (state + zeros["out"], *output[1:]) if isinstance(output, tuple) else state + zeros["out"]

    stack: Any = model.get_submodule(find_blocks(model).path)
    hooks = [
        stack[first].register_forward_pre_hook(before, with_kwargs=True),
        stack[last].register_forward_hook(behind),
    ]
    loss = inner(**batch, use_cache=False).loss * tokens
    for hook in hooks:
        hook.remove()
    arriving, leaving = torch.autograd.grad(loss, (zeros["out"], zeros["in"]))
    return seen["h"], arriving, leaving


def test_the_full_models_side(family: str, pico: Pico, context_of: MakeContext) -> None:
    model = pico(family).train()
    context = context_of(model)
    batch = context.calibration[0]
    model.eval()
    h, arriving, leaving = states_between(model, batch, 1, 4)
    model.train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    found = FullMiddle(context).forward(batch, h)
    assert_close(found.arriving, arriving, rtol=1e-3, atol=1e-4)
    assert_close(found.leaving, leaving, rtol=1e-3, atol=1e-4)
    assert float(leaving.abs().max()) > 1e-2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_uncompressed_middle_hands_back_the_same(family: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family), adapter=(0, 3, 5))
    run = run_of(Distill(w_grad=1.0, **ALONE), start(context), context)
    assert run._loss(context.calibration[0]).item() < 1e-6


def test_the_double_has_an_error_of_one() -> None:
    """A map twice as steep, behind which the same gradient arrives: ``J_E' v = 2 J_M' v``."""
    h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    v = torch.ones(2, 3, 4)
    (leaving,) = torch.autograd.grad(h.tanh(), h, v)
    assert handed_back_error(Handed(v, leaving), h, 2 * h.tanh(), torch.ones(2, 3)).item() == pytest.approx(1)


def test_idle_blocks_hand_back_what_arrives(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=random_batches(1))
    with torch.no_grad():
        for index in context.middle:
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                context.block(index).get_submodule(path).weight.zero_()  # type: ignore[operator]
    (batch,) = context.calibration
    h, arriving, _ = states_between(pico_llama, batch, 1, 4)
    found = FullMiddle(context).forward(batch, h)
    assert_close(found.leaving, found.arriving)
    assert_close(found.arriving, arriving, rtol=1e-3, atol=1e-5)


def test_through_the_chain_rule_it_is_the_adapters_gradient(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Handed back as v through the block in front, ``J' v`` gives the gradients that ``full_gradients`` finds there."""
    context = context_of(pico_llama, calibration=random_batches(1))
    (batch,) = context.calibration
    front = context.block(0)
    seen: list[Tensor] = []
    hook = front.register_forward_hook(lambda _, __, output: seen.append(output))
    pico_llama(**batch)
    hook.remove()
    found = FullMiddle(context).forward(batch, seen[0].detach())
    names = [name for name, _ in front.named_parameters()]
    ours = torch.autograd.grad(seen[0], [p for _, p in front.named_parameters()], found.leaving)
    full = full_gradients(context, [batch])
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    for name, gradient in zip(names, ours, strict=True):
        assert_close(gradient / tokens, full[f"adapter.0.{name}"], rtol=1e-3, atol=1e-6)


def test_padding_counts_for_nothing(pico_llama: nn.Module, context_of: MakeContext, pico_batch: Batch) -> None:
    context = context_of(pico_llama)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wide = {k: nn.functional.pad(v, (0, 7), value=pad[k]) for k, v in pico_batch.items()}
    left = {k: nn.functional.pad(v, (7, 0), value=pad[k]) for k, v in pico_batch.items()}
    run = run_of(Distill(w_grad=1.0, mask=False, **ALONE), dropped(context), context)
    losses = [run._loss(batch).item() for batch in (pico_batch, wide)]
    assert losses[0] > 0.1 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert run._loss(left).item() == pytest.approx(losses[0], rel=1e-3)


# Its gradient


# RMS norms compute in fp32 whatever comes in, so LLaMA's losses aren't exact enough for a small step.
@pytest.mark.parametrize(
    ("family", "step", "rel"),
    [("gpt2", 1e-5, 1e-4), ("bloom", 1e-5, 1e-4), ("gpt_neox", 1e-5, 1e-4), ("llama", 2e-4, 5e-3)],
)
def test_against_a_difference_quotient(
    family: str, step: float, rel: float, pico: Pico, context_of: MakeContext
) -> None:
    """In float64, along a random direction of all the emulator's weights, with padding in the batch."""
    context = context_of(pico(family))
    run = run_of(Distill(w_grad=3.0, **ALONE), dropped(context), context)
    context.model.double()
    run.student.network.double()
    run.full = FullMiddle(context)
    batch, parameters = context.calibration[0], list(run.student.parameters.values())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    gradients = torch.autograd.grad(run._loss(batch), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    for way in (1, -2):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=way * step)
        values.append(run._loss(batch).item())
    assert abs(slope) > 0.1
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=rel)


def test_every_family_learns_by_it(family: str, pico: Pico, context_of: MakeContext) -> None:
    """Five steps on one batch lower its loss; the owner's model stays, and so does what it is given."""
    context = context_of(pico(family), calibration=random_batches(1))
    (batch,) = context.calibration
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    run = run_of(Distill(steps=5, lr=1e-3, w_grad=1.0, **ALONE), dropped(context), context)
    first = run._loss(batch).item()
    for step in range(5):
        run._step(step)
    assert all(bool(torch.isfinite(p).all()) for p in run.student.parameters.values())
    assert run._loss(batch).item() < 0.97 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert all(p.grad is None for p in context.model.parameters())


@pytest.mark.parametrize("spec", ["low-rank:keep=0.5,mode=plain", "crash:keep=0.5,sharing=all"])
def test_factors_and_shared_blocks(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    method = Distill(steps=2, lr=1e-3, w_grad=1.0, w_lm=0.0, select="train", eval_every=2)
    given = parse_emulator(spec).compress(start(context), context)
    built = method.compress(given, context)
    assert parse_emulator(str(method)) == method
    assert built.layout == given.layout and not same(built, given)
    assert bool(torch.isfinite(emulated_network(built, context)(**context.calibration[0]).logits).all())


def test_half_precision_comes_back_in_half_precision(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.to(torch.bfloat16))
    method = Distill(steps=4, lr=3e-3, w_grad=1.0, w_lm=0.0, select="train", eval_every=4)
    built = method.compress(dropped(context), context)
    assert {p.dtype for p in weights(built)} == {torch.bfloat16}
    assert all(bool(torch.isfinite(p).all()) for p in weights(built)) and not same(built, dropped(context))


def test_with_dropout(pico: Pico, context_of: MakeContext) -> None:
    """The student drops, the full model's middle doesn't: without residuals the emulator hands back v itself.

    The block in front drops as well, so that the embeddings enter the middle.
    """
    model = pico("gpt2", resid_pdrop=1.0, embd_pdrop=0.0, attn_pdrop=0.0)
    context = context_of(model, calibration=random_batches(1))
    (batch,) = context.calibration
    run = run_of(Distill(w_grad=1.0, dropout=True, **ALONE), dropped(context), context)
    hook = context.block(0).register_forward_hook(
        lambda _, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    _, arriving, leaving = states_between(model, batch, 1, 4)
    hook.remove()
    kept = batch["attention_mask"].bool()
    expected = (arriving - leaving)[kept].square().sum() / leaving[kept].square().sum()
    assert run._step(0) == pytest.approx(expected.item(), rel=1e-4)


# What training by it does


@functools.cache
def trained(w_grad: float) -> tuple[float, ...]:
    """The cosines by adapter block on calibration text after 24 steps at 2e-3, and over all blocks.

    A pico LLaMA that learned its text for 100 steps, whose middle of 4 blocks lost 2.
    """
    model, batches, _ = trained_llama()
    context = Context(model, find_blocks(model), (0, 5), (1, 2, 3, 4), calibration=batches[:8])
    method = Distill(steps=24, lr=2e-3, w_grad=w_grad, select="train", eval_every=24)
    emulator = method.compress(dropped(context), context)
    match = match_gradients(
        emulator_gradients(emulator, context, context.calibration), full_gradients(context, context.calibration)
    )
    return (*match.cosine_by_block, match.cosine)


def test_it_turns_the_adapters_gradients_towards_the_full_models() -> None:
    """Above all those of the block in front, and more than the same steps by the other losses do."""
    with_it, without = trained(10.0), trained(0.0)
    assert with_it[0] > without[0] + 0.02
    assert with_it[-1] > without[-1] + 0.02


class Interrupted(Exception):
    """Stands for a killed process."""


def test_interrupted_and_resumed_equals_at_once(
    pico_llama: nn.Module, context_of: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(pico_llama)
    method = Distill(steps=6, lr=1e-3, w_grad=1.0, w_lm=0.0, select="train", eval_every=2)
    emulator = dropped(context)
    at_once = method.compress(emulator, context)
    steps: list[int] = []
    step_of = distill.DistillRun._step

    def step(self: Any, number: int) -> float:
        steps.append(number)
        if len(steps) == 4:
            raise Interrupted
        return step_of(self, number)

    monkeypatch.setattr(distill.DistillRun, "_step", step)
    resumable = replace(context, workdir=tmp_path)
    with pytest.raises(Interrupted):
        method.compress(emulator, resumable)
    assert same(method.compress(emulator, resumable), at_once)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    assert not same(replace(method, w_grad=2.0).compress(emulator, resumable), at_once)


def test_the_better_loss_alone_is_not_enough_to_be_chosen(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """A rate that ruins the emulator: it comes back as it came in."""
    context = context_of(pico_llama)
    method = Distill(steps=2, lr=3.0, warmup=0.0, eval_every=1, clip=0.0, w_grad=1.0, select="distill")
    assert same(method.compress(dropped(context), context), dropped(context))


# When it isn't computed, and where it can't be


def test_of_weight_zero_it_is_not_computed(
    pico_llama: nn.Module, context_of: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the full model's side nor attention of another kind than clients run."""

    def never(*_: Any) -> Any:
        raise AssertionError

    for name in ("twice_differentiable", "handed_back_error"):
        monkeypatch.setattr(distill, name, never)
    monkeypatch.setattr(FullMiddle, "forward", never)
    context = context_of(pico_llama)
    built = Distill(steps=2, lr=1e-3, w_lm=0.0, select="train", eval_every=2).compress(dropped(context), context)
    assert not same(built, dropped(context))
    assert str(Distill(w_grad=0.0)) == "distill"


@pytest.mark.parametrize(("adapter", "fits"), [((5,), False), ((4, 5), False), ((0, 3, 5), True), ((2,), True)])
def test_an_adapter_in_front_is_needed(
    adapter: tuple[int, ...], fits: bool, pico_llama: nn.Module, context_of: MakeContext
) -> None:
    context = context_of(pico_llama, adapter=adapter)
    method = Distill(steps=1, w_grad=1.0, eval_every=1)
    if fits:
        method.compress(dropped(context), context)
        return
    with pytest.raises(EmulatorError, match="this split has none there: set w-grad=0"):
        method.compress(dropped(context), context)
    replace(method, w_grad=0.0).compress(dropped(context), context)
