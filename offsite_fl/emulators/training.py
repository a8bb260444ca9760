"""Train an emulator's weights on calibration batches: the loop, the choice of the best, going on after a cut.

A method says what is minimised and by which measure the best is chosen (:class:`TrainingRun`); everything else is the
same for all: a shuffled order that the seed fixes, AdamW with clipped gradients, candidates measured as they would be
handed out, checkpoints.
"""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock
from offsite_fl.emulators.student import Student
from offsite_fl.emulators.training_state import Checkpoints, RunState, fingerprint
from offsite_fl.emulators.weights import refuse_quantized
from offsite_fl.errors import EmulatorError

log = logging.getLogger(__name__)


class TrainingOptions(Protocol):
    """What the loop reads of a method's options; ``str(options)`` is part of a checkpoint's fingerprint."""

    name: ClassVar[str]

    @property
    def steps(self) -> int:
        """Number of batches, each one step of the optimiser."""

    @property
    def lr(self) -> float:
        """The highest learning rate."""

    @property
    def clip(self) -> float:
        """Norm that gradients are clipped to; 0: not."""

    @property
    def weight_decay(self) -> float:
        """Decay of weight matrices."""

    @property
    def eval_every(self) -> int:
        """Steps between two candidates."""

    def rate(self, step: int) -> float:
        """Learning rate of the step with index ``step``."""


O = TypeVar("O", bound=TrainingOptions)  # noqa: E741 (options)


@dataclass
class TrainingRun(ABC, Generic[O]):
    """One training of an emulator: what it works on, and how far it has come.

    The emulator as it came in is the first candidate, so by the run's own measure the result is never worse than it.
    ``step`` is the index of the step in work.
    """

    options: O
    emulator: Emulator
    context: Context
    train: list[Batch]
    validation: list[Batch]
    student: Student = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    step: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.student = Student(self.emulator, self.context)
        named = self.student.parameters
        if not named:
            raise EmulatorError(f"{self.options.name}: the emulator's blocks hold no floating-point weights to train")
        names = self._decayed()
        decayed = [p for name, p in named.items() if name in names]
        rest = [p for name, p in named.items() if name not in names]
        groups = [{"params": decayed, "weight_decay": self.options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.options.lr)

    @abstractmethod
    def _loss(self, batch: Batch) -> Tensor:
        """What is minimised, on ``batch`` (on the student's device): a scalar with gradient."""

    def _decayed(self) -> set[str]:
        """Names of the parameters that weight decay applies to."""
        return self.student.decayed

    def _batches(self, step: int) -> list[Batch]:
        """The batches of the step with index ``step``; the gradient is that of the mean of their losses."""
        return [self._drawn(step)]

    def _drawn(self, number: int) -> Batch:
        """Batch ``number`` of the endless row of shuffled epochs, on the student's device."""
        order = shuffled(len(self.train), self.context.seed, number // len(self.train))
        return self._moved(self.train[order[number % len(self.train)]])

    @abstractmethod
    def _measure(self) -> float:
        """How good the student's weights of now are; lower is better."""

    def _score(self, state: RunState) -> str:
        """The best measure as people read it."""
        return f"{state.best_score:.4f}"

    def run(self) -> dict[str, Tensor]:
        """Train, and return the best values by slot name."""
        name, named = self.options.name, self.student.parameters
        checkpoints, state = self._resume()
        with training_bar(name, self.context, self.options.steps, state.step) as tell:
            while state.step < self.options.steps:
                loss = self._step(state.step)
                state.step += 1
                if state.step % self.options.eval_every == 0 or state.step == self.options.steps:
                    self._consider(state)
                    if checkpoints:
                        checkpoints.save(state, named, self.optimizer)
                tell(state.step, f"loss {loss:.3f}, best at step {state.best_step}")
        log.info("%s: best at step %d of %d, %s", name, state.best_step, self.options.steps, self._score(state))
        return state.best

    def _resume(self) -> tuple[Checkpoints | None, RunState]:
        checkpoints = None
        if self.context.workdir is not None:
            key = fingerprint(str(self.options), self.emulator, self.context, self.train, self.validation)
            checkpoints = Checkpoints(self.context.workdir, key, self.options.name)
            if found := checkpoints.load(self.student.parameters, self.optimizer, self.student.device):
                log.info("%s: continuing at step %d", self.options.name, found.step)
                return checkpoints, found
        state = RunState()
        self._consider(state)
        return checkpoints, state

    def _step(self, step: int) -> float:
        options, self.step = self.options, step
        batches, total = self._batches(step), 0.0
        for batch in batches:
            loss = self._loss(batch) / len(batches)
            if not torch.isfinite(loss):
                raise EmulatorError(
                    f"{options.name}: the loss isn't finite at step {step + 1}; try a smaller lr than {options.lr}"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if options.clip:
            nn.utils.clip_grad_norm_(self.student.parameters.values(), options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _consider(self, state: RunState) -> None:
        """Measure the weights of now, as they would be handed out, and keep them if they are the best so far."""
        named, dtypes = self.student.parameters, self.student.dtypes
        values = {name: p.detach().to(dtypes[name], copy=True) for name, p in named.items()}
        with _rounded(named, values):
            score = self._measure()
        if state.step == 0 or score < state.best_score or math.isnan(state.best_score):
            state.best_step, state.best_score = state.step, score
            state.best = {name: value.cpu() for name, value in values.items()}

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.student.device) for name, value in batch.items()}


def hold_out(
    calibration: tuple[Batch, ...], context: Context, name: str = "distill"
) -> tuple[list[Batch], list[Batch]]:
    """Batches to train on and batches to measure on, never the same ones; ``name`` is the method's.

    Without validation text a tenth of the calibration batches, at least one, is drawn by the seed and held out.
    """
    if context.validation:
        return list(calibration), list(context.validation)
    if len(calibration) < 2:
        raise EmulatorError(
            f"{name} chooses its result on text that it doesn't train on: give validation text, or calibration text "
            "for at least two batches"
        )
    count = max(1, len(calibration) // 10)
    order = shuffled(len(calibration), context.seed, -1)
    held = set(order[:count])
    return [b for i, b in enumerate(calibration) if i not in held], [calibration[i] for i in sorted(held)]


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch. It follows from its number alone, so a resumed run needs no generator's state."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def with_values(emulator: Emulator, values: dict[str, Tensor]) -> Emulator:
    """Copies of ``emulator``'s blocks that hold ``values``, named ``emulator.{block}.{path}``."""
    blocks = []
    for number, block in enumerate(emulator.blocks):
        trained = copy.deepcopy(block.module)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter.copy_(values[f"emulator.{number}.{name}"])
        blocks.append(EmulatorBlock(trained, block.origin))
    return Emulator(blocks, dict(emulator.layout))


def refuse_packed(emulator: Emulator, name: str) -> None:
    """``EmulatorError`` if the emulator holds packed weights, which the method ``name`` can't train."""
    refuse_quantized(emulator, name, f"packed weights can't be trained: put quantize last, as in '{name}+quantize'")


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
def training_bar(name: str, context: Context, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar of ``total`` steps where the owner asked for one; ``tell(steps done, note)`` moves it."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not context.progress) as bar:
        task = bar.add_task(name, total=total, completed=done, note="")

        def tell(step: int, note: str) -> None:
            bar.update(task, completed=step, note=note)

        yield tell
