"""Distillation: train the emulator to leave the middle with the hidden state that the full model leaves it with.

Offsite-Tuning (arXiv 2302.04870) trains the emulator's blocks on public text with
``L = w_lm * L_LM + w_kd * L_KD``, where ``L_KD = ||T - S||^2 / ||T||^2`` compares the output T of the full middle with
the emulator's S, both from the same hidden state. Here it is summed over real tokens only.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock, EmulatorMethod, register
from offsite_fl.emulators.distill_state import Checkpoints, RunState, fingerprint
from offsite_fl.emulators.student import Student, Teacher
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.linears import QuantizedLinear

log = logging.getLogger(__name__)


@register("distill")
@dataclass(frozen=True)
class Distill(EmulatorMethod):
    """Train the emulator towards the full middle's output and the next token; never ends worse than it began.

    Runs behind any method that leaves trainable weights, so before ``quantize``. ``steps`` batches of the calibration
    text, in a shuffled order that the seed fixes, each one step of AdamW with gradients clipped to norm ``clip`` (0:
    not) and ``weight_decay`` on weight matrices only. ``lr`` rises over the first ``warmup`` share of the steps and
    then follows ``schedule``. A loss whose weight ``w_lm`` or ``w_kd`` is 0 isn't computed at all.

    Every ``eval_every`` steps, and at the end, the emulator is measured on the validation text (if there is none, on
    the tenth of the calibration batches that is then kept out of training): by the network's perplexity or, with
    ``select=distill``, by L_KD. The best is what comes out; the emulator as it came in is the first candidate, so by
    this measure the result is never worse than the start. Where the context has a ``workdir``, every measurement also
    writes a checkpoint there, and the same call continues from it bit for bit (on a CPU).

    Closed-form emulators (``low-rank`` in its sequential mode) want a far smaller ``lr`` than dropped layers do.
    """

    steps: int = 200
    lr: float = 1e-4
    w_lm: float = 1.0
    w_kd: float = 30.0
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    eval_every: int = 50
    select: Literal["perplexity", "distill"] = "perplexity"

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every"):
            check(getattr(self, name) >= 1, f"distill {name} must be at least 1, got {getattr(self, name)}")
        check(self.lr > 0, f"distill lr must be above 0, got {self.lr}")
        for name in ("w_lm", "w_kd", "clip", "weight_decay"):
            check(getattr(self, name) >= 0, f"distill {name} can't be negative, got {getattr(self, name)}")
        check(self.w_lm + self.w_kd > 0, "distill has nothing to train for: w-lm and w-kd are both 0")
        check(0 <= self.warmup <= 1, f"distill warmup is a share of the steps from 0 to 1, got {self.warmup}")

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Train copies of ``emulator``'s blocks and return the best of them in the dtypes they came in.

        ``EmulatorError`` without calibration text, with a quantised block, or if the loss stops being a number.
        """
        calibration = context.need_calibration("distill")
        _refuse_quantized(emulator)
        train, validation = hold_out(calibration, context)
        best = _Run(self, emulator, context, train, validation).run()
        return Emulator([_with_values(b, n, best) for n, b in enumerate(emulator.blocks)], dict(emulator.layout))

    def rate(self, step: int) -> float:
        """Learning rate of the optimiser step with index ``step`` (from 0).

        >>> [Distill(steps=4, lr=1.0, warmup=0.5, schedule="linear").rate(step) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.lr * shape[self.schedule]


def relative_error(teacher: Tensor, student: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``||T - S||^2`` and ``||T||^2`` in fp32 over the tokens that ``mask`` keeps.

    The states are ``[B, T, hidden]``, the mask is ``[B, T]``.

    The quotient is L_KD, the squared error in units of the teacher's mean square. Two numbers, so that batches of
    unequal size can be added up.

    >>> t, s, mask = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.zeros(1, 2, 2), torch.tensor([[1, 0]])
    >>> error, size = relative_error(t, s, mask)
    >>> (error / size).item(), size.item()
    (1.0, 25.0)
    """
    kept = mask.bool()
    goal, got = teacher[kept].float(), student[kept].float()
    return (goal - got).square().sum(), goal.square().sum()


def hold_out(calibration: tuple[Batch, ...], context: Context) -> tuple[list[Batch], list[Batch]]:
    """Batches to train on and batches to measure on, never the same ones.

    Without validation text a tenth of the calibration batches, at least one, is drawn by the seed and held out.
    """
    if context.validation:
        return list(calibration), list(context.validation)
    if len(calibration) < 2:
        raise EmulatorError(
            "distill chooses its result on text that it doesn't train on: give validation text, or calibration text "
            "for at least two batches"
        )
    count = max(1, len(calibration) // 10)
    order = _shuffled(len(calibration), context.seed, -1)
    held = set(order[:count])
    return [b for i, b in enumerate(calibration) if i not in held], [calibration[i] for i in sorted(held)]


@dataclass
class _Run:
    """One distillation: what it works on, and how far it has come."""

    options: Distill
    emulator: Emulator
    context: Context
    train: list[Batch]
    validation: list[Batch]
    student: Student = field(init=False)
    teacher: Teacher = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.student, self.teacher = Student(self.emulator, self.context), Teacher(self.context)
        named = self.student.parameters
        if not named:
            raise EmulatorError("distill: the emulator's blocks hold no floating-point weights to train")
        decayed = [p for name, p in named.items() if name in self.student.decayed]
        rest = [p for name, p in named.items() if name not in self.student.decayed]
        groups = [{"params": decayed, "weight_decay": self.options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.options.lr)

    def run(self) -> dict[str, Tensor]:
        """Train, and return the best values by slot name."""
        checkpoints, state = self._resume()
        named = self.student.parameters
        with _bar(self.context, self.options.steps, state) as tell:
            while state.step < self.options.steps:
                loss = self._step(state.step)
                state.step += 1
                if state.step % self.options.eval_every == 0 or state.step == self.options.steps:
                    self._consider(state)
                    if checkpoints:
                        checkpoints.save(state, named, self.optimizer)
                tell(state, loss)
        log.info("distill: best at step %d of %d, %s", state.best_step, self.options.steps, self._score(state))
        return state.best

    def _resume(self) -> tuple[Checkpoints | None, RunState]:
        checkpoints = None
        if self.context.workdir is not None:
            key = fingerprint(str(self.options), self.emulator, self.context, self.train, self.validation)
            checkpoints = Checkpoints(self.context.workdir, key)
            if found := checkpoints.load(self.student.parameters, self.optimizer, self.student.device):
                log.info("distill: continuing at step %d", found.step)
                return checkpoints, found
        state = RunState()
        self._consider(state)
        return checkpoints, state

    def _step(self, step: int) -> float:
        options = self.options
        order = _shuffled(len(self.train), self.context.seed, step // len(self.train))
        batch = self._moved(self.train[order[step % len(self.train)]])
        loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise EmulatorError(
                f"distill: the loss isn't finite at step {step + 1}; try a smaller lr than {options.lr}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        if options.clip:
            nn.utils.clip_grad_norm_(self.student.parameters.values(), options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _loss(self, batch: Batch) -> Tensor:
        entering, state, nats, tokens = self.student.forward(batch, with_loss=self.options.w_lm > 0)
        loss = state.new_zeros((), dtype=torch.float32)
        if nats is not None:
            loss = loss + self.options.w_lm * nats / max(1, tokens)
        if self.options.w_kd > 0:
            error, size = self._relative_error(batch, entering, state)
            loss = loss + self.options.w_kd * error / size
        return loss

    def _relative_error(self, batch: Batch, entering: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        goal = self.teacher.forward(batch, entering).to(state.device)
        return relative_error(goal, state, batch["attention_mask"])

    def _consider(self, state: RunState) -> None:
        """Measure the weights of now, as they would be handed out, and keep them if they are the best so far."""
        named, dtypes = self.student.parameters, self.student.dtypes
        values = {name: p.detach().to(dtypes[name], copy=True) for name, p in named.items()}
        with _rounded(named, values):
            score = self._measure()
        if state.step == 0 or score < state.best_score or math.isnan(state.best_score):
            state.best_step, state.best_score = state.step, score
            state.best = {name: value.cpu() for name, value in values.items()}

    @torch.no_grad()
    def _measure(self) -> float:
        """Nats per token, or L_KD, on the validation batches; lower is better."""
        if self.options.select == "perplexity":
            with torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.student.reduced):
                return evaluate_loss(self.student.network, self.validation, self.student.device).loss
        error = size = 0.0
        for batch in map(self._moved, self.validation):
            entering, state, _, _ = self.student.forward(batch, with_loss=False)
            part = self._relative_error(batch, entering, state)
            error, size = error + part[0].item(), size + part[1].item()
        return error / size

    def _score(self, state: RunState) -> str:
        if self.options.select == "distill":
            return f"hidden error {state.best_score:.4f}"
        return f"perplexity {math.exp(min(state.best_score, 700)):.4g}"

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.student.device) for name, value in batch.items()}


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch. It follows from its number alone, so a resumed run needs no generator's state."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


@contextmanager
def _rounded(named: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """``values`` in place of the parameters for the length of a ``with`` block; nothing to do where all are fp32."""
    narrow = {name: p.detach().clone() for name, p in named.items() if values[name].dtype != p.dtype}
    with torch.no_grad():
        for name in narrow:
            named[name].copy_(values[name])
        try:
            yield
        finally:
            for name, exact in narrow.items():
                named[name].copy_(exact)


@contextmanager
def _bar(context: Context, total: int, state: RunState) -> Iterator[Callable[[RunState, float], None]]:
    columns = (TextColumn("distill"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not context.progress) as bar:
        task = bar.add_task("distill", total=total, completed=state.step, note="")

        def tell(now: RunState, loss: float) -> None:
            bar.update(task, completed=now.step, note=f"loss {loss:.3f}, best at step {now.best_step}")

        yield tell


def _with_values(block: EmulatorBlock, number: int, values: dict[str, Tensor]) -> EmulatorBlock:
    trained = copy.deepcopy(block.module)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(values[f"emulator.{number}.{name}"])
    return EmulatorBlock(trained, block.origin)


def _refuse_quantized(emulator: Emulator) -> None:
    for number, block in enumerate(emulator.blocks):
        for path, module in block.module.named_modules():
            if isinstance(module, QuantizedLinear):
                raise EmulatorError(
                    f"distill: {path} of emulator block {number} is quantised, and packed weights can't be trained; "
                    "put quantize last, as in 'distill+quantize'"
                )
