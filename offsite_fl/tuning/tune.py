"""The loop that trains the adapter (or any other set of a network's parameters) on a data owner's examples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from offsite_fl.config import TuneConfig
from offsite_fl.data.examples import split_examples
from offsite_fl.data.loader import Batch, SeededOrder, make_loader
from offsite_fl.errors import ConfigError, DataError, OffsiteError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.tuning.dtypes import prepare_dtypes
from offsite_fl.tuning.optimizer import make_optimizer, set_rate
from offsite_fl.tuning.proximal import Proximal
from offsite_fl.tuning.schedule import learning_rate
from offsite_fl.tuning.session import borrowed_accelerator, own_randomness, training_mode

_NO_GRADIENT = "no gradient reaches the trained tensors: the network's output doesn't depend on them"


@dataclass(frozen=True)
class TuneResult:
    """What came of a tuning call.

    ``tensors`` are copies, fp32 on the CPU: the values with the lowest validation loss where there is validation data,
    else the last ones; the network holds the same. Losses are nats per token, of a classifier per example.
    ``examples`` counts the training examples that were at hand (the weight of this party in an average), ``tokens``
    those that went through the network, padding not counted. ``skipped_steps`` are fp16 steps that overflowed.

    ``lr_sum`` is the sum of the learning rates of the steps that led to ``tensors``, skipped ones left out: how far a
    constant gradient would have taken them. Under SGD with a proximal term on whole tensors, each step's rate counts
    less what later steps pull back, ``sum_k lr_k prod_(j>k) (1 - mu lr_j)``: the norm ``|a_i|_1`` of FedNova
    (arXiv 2007.07481, section 4), in units of the learning rate.
    """

    tensors: dict[str, Tensor]
    steps: int
    examples: int
    tokens: int
    train_loss: float
    validation_loss: float | None = None
    best_step: int | None = None
    stopped_early: bool = False
    skipped_steps: int = 0
    lr_sum: float = 0.0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    validation_history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of this result under kebab-case names, as an update carries them."""
        numbers: dict[str, float | None] = {
            "train-loss": self.train_loss,
            "validation-loss": self.validation_loss,
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped-steps": self.skipped_steps,
            "lr-sum": self.lr_sum,
            "seconds": self.seconds,
        }
        return {name: float(value) for name, value in numbers.items() if value is not None}


def tune(
    network: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    train: Dataset,
    config: TuneConfig,
    *,
    validation: Dataset | None = None,
    pad_id: int = 0,
    received: Mapping[str, Tensor] | None = None,
    beside: Mapping[str, nn.Parameter] | None = None,
    correction: Mapping[str, Tensor] | None = None,
) -> TuneResult:
    """Train ``trainable``, live parameters of ``network`` by name, on ``train``; nothing else of the network changes.

    Parameters
    ----------
    train
        Examples as :func:`offsite_fl.data.by_task.examples_for` makes them for what ``network`` is for.
    config
        ``max_steps`` overrides ``epochs``. ``schedule_offset`` also says where in the endless sequence of seeded epochs
        this call begins, so that rounds walk on through the data instead of repeating its beginning.
    validation
        Watched every ``eval_every`` steps (None: every epoch) and at the end; the best values are kept. None with
        ``validation_share`` above 0 holds back a part of ``train``.
    received
        What the proximal term measures the distance to; None: the values at the start of this call.
    beside
        Parameters that stay as they are but belong to the trained ones: LoRA factors of which only the other one of
        each linear is trained. They are fp32 as well, and the proximal term measures products with them.
    correction
        Added to the gradient of each step, by name, as SCAFFOLD does (arXiv 1910.06378). After clipping: what is
        clipped is this party's own gradient, so that the mean step less the correction is the
        mean of the clipped gradients.

    Raises
    ------
    OffsiteError
        The loss or the gradient isn't finite, or no gradient reaches the trained tensors; names the step.
    """
    started = time.perf_counter()
    if validation is None and config.validation_share > 0:
        train, validation = split_examples(train, config.validation_share, config.seed)
    if config.patience is not None and validation is None:
        raise ConfigError("patience needs data to watch: give validation data, or a validation-share above 0")
    with borrowed_accelerator(config) as accelerator:
        device = accelerator.device
        network.to(device)
        prepare_dtypes(network, {**trainable, **(beside or {})}, config)
        mode = training_mode(network, trainable, config)
        with mode, own_randomness(config.seed + config.schedule_offset, device):
            loop = _Loop(network, trainable, config, accelerator, received, beside or {}, correction or {})
            return loop.run(train, validation, pad_id, started)


def steps_per_epoch(examples: int, config: TuneConfig) -> int:
    """Optimiser steps of one pass over ``examples``; the last of an epoch may be smaller."""
    return math.ceil(math.ceil(examples / config.batch_size) / config.gradient_accumulation)


def planned_steps(examples: int, config: TuneConfig) -> int:
    """Optimiser steps of one call of :func:`tune`, unless it stops early."""
    if config.max_steps is not None:
        return config.max_steps
    # Less a hair, since 0.1 * 30 is a little more than 3.
    return max(1, math.ceil(config.epochs * steps_per_epoch(examples, config) - 1e-9))


def _steps(train: Dataset, config: TuneConfig, pad_id: int) -> Iterator[list[Batch]]:
    """Without end: the batches of each optimiser step from step ``schedule_offset`` on."""
    loader = make_loader(
        train, config.batch_size, pad_id=pad_id, shuffle=True, seed=config.seed, augment=config.augment
    )
    count = steps_per_epoch(len(train), config)
    order = loader.sampler
    assert isinstance(order, SeededOrder)
    order.epoch, skip = divmod(config.schedule_offset, count)
    while True:
        batches = iter(loader)
        for number in range(count):
            group = list(islice(batches, config.gradient_accumulation))
            if number >= skip:
                yield group
        skip = 0


class _Loop:
    def __init__(
        self,
        network: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        config: TuneConfig,
        accelerator: Accelerator,
        received: Mapping[str, Tensor] | None,
        beside: Mapping[str, nn.Parameter],
        correction: Mapping[str, Tensor],
    ) -> None:
        self.network, self.trainable, self.config, self.accelerator = network, trainable, config, accelerator
        self.objective = objective_of(network)
        scale = config.lora_alpha / config.lora_rank if config.lora_rank else 1.0
        watched = {**trainable, **beside}
        start = watched if received is None else received
        self.proximal = Proximal(watched, start, scale) if config.proximal_mu > 0 else None
        self.optimizer = accelerator.prepare_optimizer(
            make_optimizer(network, trainable, config), device_placement=False
        )
        self.correction = {name: value.to(accelerator.device) for name, value in correction.items()}
        self.skipped = self.tokens = 0
        self.lr_sum = 0.0
        self.best: tuple[float, int, dict[str, Tensor], float] | None = None

    def run(self, train: Dataset, validation: Dataset | None, pad_id: int, started: float) -> TuneResult:
        config, total = self.config, planned_steps(len(train), self.config)
        every = config.eval_every or steps_per_epoch(len(train), config)
        history: list[tuple[int, float]] = []
        watched: list[tuple[int, float]] = []
        nats = counted = 0.0
        stopped = False
        with self._bar() as bar:
            task = bar.add_task("tuning", total=total, loss="")
            for step, group in enumerate(islice(_steps(train, config, pad_id), total), start=1):
                loss, count = self._step(group, step, total)
                history.append((step, loss))
                nats, counted = nats + loss * count, counted + count
                bar.update(task, advance=1, loss=f"loss {loss:.3f}")
                if validation is not None and (step % every == 0 or step == total):
                    watched.append((step, self._watch(validation, pad_id, step, total)))
                    stopped = self._out_of_patience(watched) and step < total
                    if stopped:
                        break
        self._take_best()
        return TuneResult(
            tensors=self._copy(),
            steps=len(history),
            examples=len(train),
            tokens=self.tokens,
            train_loss=nats / counted,
            validation_loss=self.best[0] if self.best else None,
            best_step=self.best[1] if self.best else None,
            stopped_early=stopped,
            skipped_steps=self.skipped,
            lr_sum=self.best[3] if self.best else self.lr_sum,
            seconds=time.perf_counter() - started,
            history=history,
            validation_history=watched,
        )

    def _step(self, group: list[Batch], step: int, total: int) -> tuple[float, int]:
        """One optimiser step over a group of batches; returns its mean loss and the number of predicted tokens."""
        batches = [{n: t.to(self.accelerator.device) for n, t in batch.items()} for batch in group]
        # Over all tokens (or examples) of the step: accumulated batches weigh exactly as one large batch would.
        count = sum(self.objective.count(batch) for batch in group)
        if count == 0:
            raise DataError(f"the examples of step {step} have no token to predict; every example needs an answer")
        loss = 0.0
        for number, batch in enumerate(batches):
            with self.accelerator.autocast():
                share = self.objective.nll(self.network, batch)[0] / count
            loss += share.item()
            if number == 0 and self.proximal is not None:
                share = share + self.config.proximal_mu / 2 * self.proximal()
            self._must_be_finite(share.item(), "loss", step, total)
            if not share.requires_grad:
                raise OffsiteError(_NO_GRADIENT)
            self.accelerator.backward(share)
        self._update(step, total)
        self.tokens += sum(int(batch["attention_mask"].sum()) for batch in group if "attention_mask" in batch)
        return loss, count

    def _update(self, step: int, total: int) -> None:
        config = self.config
        parameters = [p for p in self.trainable.values() if p.grad is not None]
        norm = self.accelerator.clip_grad_norm_(parameters, config.clip_norm or math.inf) if parameters else None
        size = 0.0 if norm is None else float(norm)
        if self.accelerator.scaler is None:
            self._must_be_finite(size, "gradient norm", step, total)
        if step == 1 and size == 0:
            raise OffsiteError(_NO_GRADIENT)
        schedule = config.schedule_steps or config.schedule_offset + total
        rate = learning_rate(config, config.schedule_offset + step - 1, schedule)
        set_rate(self.optimizer, rate)
        self._correct()
        self.optimizer.step()
        self._count(rate, self.accelerator.optimizer_step_was_skipped)
        self.optimizer.zero_grad()

    def _correct(self) -> None:
        for name, value in self.correction.items():
            parameter = self.trainable[name]
            parameter.grad = value.clone() if parameter.grad is None else parameter.grad.add_(value)

    def _count(self, rate: float, skipped: bool) -> None:
        self.skipped += int(skipped)
        if not skipped:
            pulls = self.config.optimizer == "sgd" and self.config.lora_rank == 0
            self.lr_sum = self.lr_sum * (1 - rate * self.config.proximal_mu * pulls) + rate

    def _must_be_finite(self, value: float, what: str, step: int, total: int) -> None:
        if not math.isfinite(value):
            raise OffsiteError(
                f"{what} is {value} in step {step} of {total}; lower lr (now {self.config.lr:g}) or set "
                f"precision = 'no' (now {self.config.precision!r})"
            )

    def _watch(self, validation: Dataset, pad_id: int, step: int, total: int) -> float:
        loader = make_loader(validation, self.config.batch_size, pad_id=pad_id)
        with self.accelerator.autocast():
            loss = evaluate_loss(self.network, loader, self.accelerator.device, nll=self.objective.nll).loss
        self._must_be_finite(loss, "validation loss", step, total)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step, self._copy(), self.lr_sum)
        return loss

    def _out_of_patience(self, watched: list[tuple[int, float]]) -> bool:
        if self.config.patience is None or self.best is None:
            return False
        return sum(step > self.best[1] for step, _ in watched) >= self.config.patience

    def _take_best(self) -> None:
        if self.best is not None:
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter.copy_(self.best[2][name])

    def _copy(self) -> dict[str, Tensor]:
        return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.trainable.items()}

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, TextColumn("{task.fields[loss]}"), disable=not self.config.progress, transient=True)
