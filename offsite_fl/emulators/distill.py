"""Distillation: train the emulator to leave the middle with the hidden state that the full model leaves it with.

Offsite-Tuning (arXiv 2302.04870) trains the emulator's blocks on public text with
``L = w_lm * L_LM + w_kd * L_KD``, where ``L_KD = mean(((T - S) / rms)^2)`` with ``rms = sqrt(mean(T^2))``, so
``||T - S||^2 / ||T||^2``, compares the output T of the full middle with the emulator's S, both from the same hidden
state. The mean is over real tokens here, over all tokens in the original code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorMethod, register
from offsite_fl.emulators.handed_back import (
    FullMiddle,
    handed_back_error,
    refuse_without_front,
    twice_differentiable,
)
from offsite_fl.emulators.student import Student, Teacher
from offsite_fl.emulators.training import TrainingRun, hold_out, refuse_packed, with_values
from offsite_fl.emulators.training_state import RunState
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.models.tasks import task_of


@register("distill")
@dataclass(frozen=True)
class Distill(EmulatorMethod):
    """Train the emulator towards the full middle's output and the next token; never ends worse than it began.

    Offsite-Tuning, arXiv 2302.04870: ``w_lm * L_LM + w_kd * L_KD``. A weight that isn't given (``none``) is the paper's
    for what the model is for: 1 and 30 for language, classifiers of text included, 0 and 1 for classifiers of images.
    Runs behind any method that leaves trainable weights, so before ``quantize``. ``steps`` steps of AdamW, each on
    ``accumulate`` batches of the calibration text in a shuffled order that the seed fixes, with gradients clipped to
    norm ``clip`` (0: not) and ``weight_decay`` on weight matrices only. ``lr`` rises over the first ``warmup`` share of
    the steps, or over ``warmup_steps`` where it is given, and then follows ``schedule``. A loss whose weight ``w_lm``,
    ``w_kd`` or ``w_grad`` is 0 isn't computed at all.

    ``w_grad`` is ours: it adds ``w_grad * L_grad``, which compares the gradient that the emulator hands back to the
    adapter blocks in front of it with the full middle's (:mod:`offsite_fl.emulators.handed_back`). A step then also
    takes the full model forward and back, and the emulator's own backward pass is differentiated once more.

    Every ``eval_every`` steps, and at the end, the emulator is measured on the validation text (if there is none, on
    the tenth of the calibration batches that is then kept out of training): by the network's perplexity or, with
    ``select=distill``, by L_KD. The best is what comes out; the emulator as it came in is the first candidate, so by
    this measure the result is never worse than the start. Where the context has a ``workdir``, every measurement also
    writes a checkpoint there, and the same call continues from it bit for bit (on a CPU).

    As the published code did it, for comparisons: ``select=train`` takes the mean L_KD of the steps since the last
    candidate as the measure and no other text (vision; the emulator as it came in is no candidate then);
    ``mask=false`` lets padding count in L_KD; ``dropout=true`` trains with the dropout of the model's config;
    ``decay_norms=true`` decays everything but biases; ``warmup_steps`` may be more than ``steps``. Of the 2000 ticks of
    its schedule 8 passed a step, which makes ``warmup_steps=250``, and ``accumulate`` stands for its 8 GPUs.

    Closed-form emulators (``low-rank`` in its sequential mode) want a far smaller ``lr`` than dropped layers do.
    """

    steps: int = 200
    lr: float = 1e-4
    w_lm: float | None = field(default=None, metadata={"none": "1 and for images 0"})
    w_kd: float | None = field(default=None, metadata={"none": "30 and for images 1"})
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    eval_every: int = 50
    select: Literal["perplexity", "distill", "train"] = "perplexity"
    accumulate: int = 1
    warmup_steps: int | None = None
    mask: bool = True
    dropout: bool = False
    decay_norms: bool = False
    w_grad: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "accumulate"):
            check(getattr(self, name) >= 1, f"distill {name} must be at least 1, got {getattr(self, name)}")
        check(self.lr > 0, f"distill lr must be above 0, got {self.lr}")
        for name in ("w_lm", "w_kd", "w_grad", "clip", "weight_decay"):
            check((getattr(self, name) or 0) >= 0, f"distill {name} can't be negative, got {getattr(self, name)}")
        idle = self.w_lm == self.w_kd == self.w_grad == 0
        check(not idle, "distill has nothing to train for: w-lm, w-kd and w-grad are all 0")
        check(
            self.select != "train" or self.w_kd != 0, "distill select=train needs the loss L_KD: w-kd must be above 0"
        )
        check(
            0 <= self.warmup <= 1,
            f"distill warmup is a share of the steps from 0 to 1, got {self.warmup}; warmup-steps is a number of them",
        )
        check(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"distill warmup_steps can't be negative, got {self.warmup_steps}",
        )

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Train copies of ``emulator``'s blocks and return the best of them in the dtypes they came in.

        ``EmulatorError`` without calibration text, with a quantised block, or if the loss stops being a number.
        """
        calibration = context.need_calibration("distill")
        refuse_packed(emulator, self.name)
        if self.w_grad > 0:
            refuse_without_front(context)
        # The mean training loss asks for no text of its own.
        held = (list(calibration), []) if self.select == "train" else hold_out(calibration, context)
        train, validation = held
        return with_values(emulator, DistillRun(self, emulator, context, train, validation).run())

    def loss_weights(self, model: nn.Module) -> tuple[float, float]:
        """``w_lm`` and ``w_kd`` for distilling ``model``: those given, else the paper's for what it is for.

        ``EmulatorError`` if nothing is left to train for.
        """
        images = task_of(model) == "image-classification"
        w_lm, w_kd = (0.0, 1.0) if images else (1.0, 30.0)
        w_lm, w_kd = w_lm if self.w_lm is None else self.w_lm, w_kd if self.w_kd is None else self.w_kd
        if w_lm == w_kd == self.w_grad == 0:
            raise EmulatorError("distill has nothing to train for: w-kd is 0, and for images so is w-lm; give w-lm")
        return w_lm, w_kd

    def rate(self, step: int) -> float:
        """Learning rate of the optimiser step with index ``step`` (from 0).

        >>> [Distill(steps=4, lr=1.0, warmup=0.5, schedule="linear").rate(step) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rising = round(self.warmup * self.steps) if self.warmup_steps is None else self.warmup_steps
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


@dataclass
class DistillRun(TrainingRun[Distill]):
    """One distillation; ``interval`` holds the L_KD of each batch since the last candidate.

    ``w_lm`` and ``w_kd`` are the weights of the losses once the model is known.
    """

    w_lm: float = field(init=False)
    w_kd: float = field(init=False)
    teacher: Teacher = field(init=False)
    full: FullMiddle = field(init=False)
    interval: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.w_lm, self.w_kd = self.options.loss_weights(self.context.model)
        # Checkpoints are named by the options, so these say the weights that the run has.
        self.options = replace(self.options, w_lm=self.w_lm, w_kd=self.w_kd)
        super().__post_init__()
        self.teacher = Teacher(self.context)
        self.full = FullMiddle(self.context)

    def _decayed(self) -> set[str]:
        named = set(self.student.parameters)
        return named - self.student.biases if self.options.decay_norms else self.student.decayed

    def _batches(self, step: int) -> list[Batch]:
        count = self.options.accumulate
        return [self._drawn(step * count + number) for number in range(count)]

    def _step(self, step: int) -> float:
        if not self.options.dropout:
            return super()._step(step)
        with _dropping(self.student, self.context.seed * 1_000_003 + step):
            return super()._step(step)

    def _loss(self, batch: Batch) -> Tensor:
        graded = self.options.w_grad > 0
        with twice_differentiable() if graded else nullcontext():
            entering, state, nats, tokens = self.student.forward(batch, with_loss=self.w_lm > 0, leaf=graded)
        loss = state.new_zeros((), dtype=torch.float32)
        if nats is not None:
            loss = loss + self.w_lm * nats / max(1, tokens)
        if self.w_kd > 0:
            error, size = self._relative_error(batch, entering, state)
            loss = loss + self.w_kd * error / size
            self.interval.append((error / size).item())
        if graded:
            full = self.full.forward(batch, entering)
            loss = loss + self.options.w_grad * handed_back_error(full, entering, state, _real(batch, state))
        return loss

    def _relative_error(self, batch: Batch, entering: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        goal = self.teacher.forward(batch, entering).to(state.device)
        kept = _real(batch, state)
        return relative_error(goal, state, kept if self.options.mask else torch.ones_like(kept))

    @torch.no_grad()
    def _measure(self) -> float:
        """Nats per token or L_KD on the validation batches, or mean L_KD of the last steps; lower is better."""
        if self.options.select == "train":
            seen, self.interval = self.interval, []
            return sum(seen) / len(seen) if seen else math.inf
        if self.options.select == "perplexity":
            with torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.student.reduced):
                network, device = self.student.network, self.student.device
                return evaluate_loss(network, self.validation, device, nll=objective_of(network).nll).loss
        error = size = 0.0
        for batch in map(self._moved, self.validation):
            entering, state, _, _ = self.student.forward(batch, with_loss=False)
            part = self._relative_error(batch, entering, state)
            error, size = error + part[0].item(), size + part[1].item()
        return error / size

    def _score(self, state: RunState) -> str:
        if self.options.select != "perplexity":
            return f"hidden error {state.best_score:.4f}"
        return f"perplexity {math.exp(min(state.best_score, 700)):.4g}"


def _real(batch: Batch, state: Tensor) -> Tensor:
    """Which places of ``state`` [B, T, hidden] hold a token; of images, which have no mask, all."""
    mask = batch.get("attention_mask")
    return mask if mask is not None else state.new_ones(state.shape[:2], dtype=torch.int64)


@contextmanager
def _dropping(student: Student, seed: int) -> Iterator[None]:
    """Train mode (dropout) for the length of a ``with`` block, its randomness fixed by ``seed`` alone."""
    device = student.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        student.network.train()
        try:
            yield
        finally:
            student.network.eval()
