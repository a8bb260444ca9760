"""Distillation: what it computes and what it doesn't, what it changes and what it leaves, and that it resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from offsite_fl.emulators import distill, training_state
from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.distill import Distill, hold_out, relative_error
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.quantize import Quantize
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.emulators.student import Student, Teacher, evaluating
from offsite_fl.emulators.training import shuffled
from offsite_fl.errors import CheckpointError, ConfigError, EmulatorError
from offsite_fl.evaluation.loss import causal_nll
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.linears import LowRankLinear, replace_module
from offsite_fl.models.walk import call_block, capture_calls

Pico = Callable[..., nn.Module]

TEXT = """Four score and seven years ago our fathers brought forth, upon this continent, a new nation, conceived in
liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil
war, testing whether that nation, or any nation so conceived, and so dedicated, can long endure. We are met on a
great battle field of that war. We have come to dedicate a portion of it, as a final resting place for those who
died here, that the nation might live. This we may, in all propriety do. But, in a larger sense, we can not
dedicate, we can not consecrate, we can not hallow, this ground. The brave men, living and dead, who struggled
here, have hallowed it, far above our poor power to add or detract. The world will little note, nor long
remember what we say here; while it can never forget what they did here. It is rather for us, the living, we
here be dedicated to the great task remaining before us, that, from these honored dead we take increased
devotion to that cause for which they here, gave the last full measure of devotion; that we here highly resolve
these dead shall not have died in vain; that the nation, shall have a new birth of freedom, and that government
of the people by the people for the people, shall not perish from the earth."""


def text_batches(tokenizer: PreTrainedTokenizerFast, length: int = 32, size: int = 4) -> tuple[Batch, ...]:
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    full = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    return tuple({"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r.clone()} for r in full)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, tuple[Batch, ...]]]:
    """A pico LLaMA that has learned a little of the text, so that there is something to lose, and the batches."""
    from tests.conftest import make_pico, make_tokenizer

    batches = text_batches(make_tokenizer())
    model = make_pico("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        nats, tokens = causal_nll(model, batches[step % (len(batches) - 3)])
        (nats / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    yield model, batches


def context_of(model: nn.Module, batches: tuple[Batch, ...] = (), **more: Any) -> Context:
    return Context(model, find_blocks(model), (0, 5), (1, 2, 3, 4), calibration=batches, **more)


def dropped(context: Context, keep: int = 2) -> Emulator:
    return LayerDrop(keep).compress(start(context), context)


def weights(emulator: Emulator) -> list[Tensor]:
    return [p.detach().clone() for block in emulator.blocks for p in block.module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
    context = context_of(pico_llama)
    assert_close(*(torch.tensor(measured(dropped(context), context, (b,))) for b in (pico_batch, wide)))


# What is computed, and what isn't


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the teacher ran and how often the next-token loss was computed for training."""
    counts = {"teacher": 0, "loss": 0, "head": 0}
    teach, nll = Teacher.forward, causal_nll

    def forward(self: Teacher, batch: Batch, hidden: Tensor) -> Tensor:
        counts["teacher"] += 1
        return teach(self, batch, hidden)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        counts["loss"] += 1
        return nll(model, batch)

    monkeypatch.setattr(Teacher, "forward", forward)
    monkeypatch.setattr("offsite_fl.emulators.student.causal_nll", loss)
    return counts


def test_a_loss_of_weight_zero_is_not_computed(
    pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast, counted: dict[str, int]
) -> None:
    batches = text_batches(pico_tokenizer)[:3]
    context = context_of(pico_llama, batches, validation=batches[:1])
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
    context = context_of(pico_llama)
    student = Student(dropped(context), context)
    ran: list[str] = []
    for name, module in student.network.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    student.forward(pico_batch, with_loss=False)
    assert "model.layers.2.mlp" in ran, "the last emulator block"
    assert not {"model.layers.3", "model.norm", "lm_head"} & set(ran)


def test_only_emulator_weights_train_and_only_matrices_decay(pico: Pico, family: str) -> None:
    context = context_of(pico(family))
    student = Student(dropped(context), context)
    learning = {name for name, p in student.network.named_parameters() if p.requires_grad}
    block = dict(context.block(1).named_parameters())
    assert set(student.parameters) == {f"emulator.{slot}.{path}" for slot in (0, 1) for path in block}
    assert len(learning) == len(student.parameters)
    matrices = {path for path, p in block.items() if p.ndim == 2}
    assert student.decayed == {f"emulator.{slot}.{path}" for slot in (0, 1) for path in matrices}
    assert not any("norm" in name or "ln_" in name or name.endswith("bias") for name in student.decayed)


# What comes of it


def test_it_lowers_hidden_error_and_perplexity_and_leaves_the_owner_alone(
    trained: tuple[nn.Module, tuple[Batch, ...]],
) -> None:
    model, batches = trained
    train, validation = batches[:-3], batches[-3:]
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    context = context_of(model, train, validation=validation)
    emulator = dropped(context)
    incoming = weights(emulator)
    tuned = Distill(steps=40, lr=2e-3, eval_every=20).compress(emulator, context)
    loss, error = measured(emulator, context, validation)
    new_loss, new_error = measured(tuned, context, validation)
    assert new_error < 0.8 * error
    assert new_loss < loss - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert same(weights(emulator), incoming)
    owned = {p.data_ptr() for p in model.parameters()}
    assert not owned & {p.data_ptr() for block in tuned.blocks for p in block.module.parameters()}
    model.eval()


def test_the_better_loss_alone_is_not_enough_to_be_chosen(trained: tuple[nn.Module, tuple[Batch, ...]]) -> None:
    """A rate that ruins the emulator: it comes back as it came in, by either measure."""
    model, batches = trained
    context = context_of(model, batches[:-3], validation=batches[-3:])
    emulator = dropped(context)
    for select in ("perplexity", "distill"):
        method = Distill(steps=4, lr=3.0, warmup=0.0, eval_every=1, clip=0.0, select=select)  # type: ignore[arg-type]
        assert same(weights(method.compress(emulator, context)), weights(emulator))


def test_shared_blocks_stay_shared(trained: tuple[nn.Module, tuple[Batch, ...]]) -> None:
    model, batches = trained
    context = context_of(model, batches)
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


def test_low_rank_factors_train(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> None:
    context = context_of(pico_llama, text_batches(pico_tokenizer))
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
def test_half_precision_comes_back_in_half_precision(
    pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> None:
    context = context_of(pico_llama.to(dtype), text_batches(pico_tokenizer))
    emulator = dropped(context)
    student = Student(emulator, context)
    assert {p.dtype for p in student.parameters.values()} == {torch.float32}
    tuned = Distill(steps=6, lr=3e-3, eval_every=3).compress(emulator, context)
    assert {p.dtype for p in weights(tuned)} == {dtype}
    assert not same(weights(tuned), weights(emulator))
    assert measured(tuned, context, context.calibration)[0] < measured(emulator, context, context.calibration)[0]


# As the published code did it


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
    context = context_of(pico_llama)
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


def test_unmasked_padding_counts(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = context_of(pico_llama)
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
def test_selection_by_training_loss(
    pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast, lr: float, best: int, accumulate: int
) -> None:
    """Six steps in three intervals: the weights at the end of that with the lowest mean L_KD, never the start's."""
    context = context_of(pico_llama, text_batches(pico_tokenizer)[:4])
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
    context = context_of(pico_llama)
    run = distill.DistillRun(Distill(select="train"), dropped(context), context, [pico_batch], [])
    seen = [run._measure()]
    for losses in ([3.0, 1.0], [4.0]):
        run.interval.extend(losses)
        seen.append(run._measure())
    assert seen == [math.inf, 2.0, 4.0]


def test_selection_by_training_loss_needs_no_other_text(
    pico_llama: nn.Module, pico_batch: Batch, counted: dict[str, int]
) -> None:
    context = context_of(pico_llama, (pico_batch,))
    Distill(steps=3, w_lm=0.0, select="train", eval_every=2).compress(dropped(context), context)
    assert counted["teacher"] == 3, "once a step, and never to measure"


@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decay_of_norms_as_published(
    pico: Pico, family: str, pico_tokenizer: PreTrainedTokenizerFast, decay_norms: bool
) -> None:
    """With it everything decays but biases, without it matrices only; a decay of 20 % a step shows."""
    context = context_of(pico(family), text_batches(pico_tokenizer)[:2])
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
    context = context_of(pico("gpt2", resid_pdrop=1.0, embd_pdrop=0.0, attn_pdrop=0.0), (pico_batch,))
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
    context = context_of(pico("gpt2", resid_pdrop=0.3), (pico_batch,))

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


def test_the_published_way_resumes_bit_for_bit(
    pico: Pico, pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(pico("gpt2", resid_pdrop=0.1), text_batches(pico_tokenizer)[:3])
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


# Going on after an interruption


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("more", [0, 2], ids=["at a checkpoint", "between two"])
def test_interrupted_and_resumed_equals_at_once(
    trained: tuple[nn.Module, tuple[Batch, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    model, batches = trained
    context = context_of(model, batches, seed=3)
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


def test_a_checkpoint_of_another_run_is_not_met(trained: tuple[nn.Module, tuple[Batch, ...]], tmp_path: Path) -> None:
    model, batches = trained
    context = context_of(model, batches, workdir=tmp_path)
    method = Distill(steps=2, eval_every=2)
    emulator, other = dropped(context), dropped(context, 3)
    for run in (method, replace(method, lr=2e-4)):
        for start_from in (emulator, other):
            run.compress(start_from, context)
    method.compress(emulator, replace(context, seed=1))
    method.compress(emulator, replace(context, calibration=batches[:-1]))
    assert len(list(tmp_path.rglob("state.safetensors"))) == 6


def test_a_damaged_checkpoint_says_so(trained: tuple[nn.Module, tuple[Batch, ...]], tmp_path: Path) -> None:
    model, batches = trained
    context = context_of(model, batches, workdir=tmp_path)
    method = Distill(steps=2, eval_every=2)
    method.compress(dropped(context), context)
    (path,) = tmp_path.rglob("state.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="delete it to start anew"):
        method.compress(dropped(context), context)


def test_a_crash_while_writing_leaves_the_old_checkpoint(
    trained: tuple[nn.Module, tuple[Batch, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = trained
    context = context_of(model, batches, workdir=tmp_path)
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


def test_held_out_text_is_never_trained_on(pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerFast) -> None:
    batches = text_batches(pico_tokenizer)
    train, held = hold_out(batches, context_of(pico_llama, batches))
    assert len(train) + len(held) == len(batches)
    assert len(held) == 1
    assert not {id(b) for b in train} & {id(b) for b in held}
    given = context_of(pico_llama, batches, validation=batches[:2])
    assert [len(part) for part in hold_out(batches, given)] == [len(batches), 2]
    with pytest.raises(EmulatorError, match="at least two batches"):
        hold_out(batches[:1], context_of(pico_llama, batches[:1]))


def test_without_calibration_text_it_says_so(pico_llama: nn.Module) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match="distill needs calibration text"):
        Distill().compress(dropped(context), context)


def test_quantised_weights_are_refused(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = context_of(pico_llama, (pico_batch, pico_batch))
    with pytest.raises(EmulatorError, match="put quantize last"):
        (Quantize() + Distill(steps=1)).compress(dropped(context), context)


def test_a_loss_that_is_not_a_number_stops_the_run(pico_llama: nn.Module, pico_batch: Batch) -> None:
    context = context_of(pico_llama, (pico_batch, pico_batch))
    with pytest.raises(EmulatorError, match=r"isn't finite at step \d+; try a smaller lr than 1e\+30"):
        Distill(steps=5, lr=1e30, warmup=0.0, clip=0.0, eval_every=5).compress(dropped(context), context)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"w_lm": -1.0}, "w_lm"),
        ({"w_lm": 0.0, "w_kd": 0.0}, "both 0"),
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
    context = context_of(pico_llama, (pico_batch, pico_batch))
    method = Distill(steps=2, eval_every=2)
    method.compress(dropped(context), context)
    assert capsys.readouterr().out == ""
    method.compress(dropped(context), replace(context, progress=True))
    assert "2/2" in capsys.readouterr().out
