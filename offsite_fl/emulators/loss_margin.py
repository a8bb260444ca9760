"""Raise an emulator's loss by a margin, so that it is a worse model by itself than the one that it stands for.

The LLE step of LLEOT (Findings of ACL 2026, 2026.findings-acl.1878): ``min_E E |L_E(P'; x) - L_M(P'; x) - H|`` over the
emulator E's weights, where L is the mean next-token loss of a sequence x, M the full model and P' a random soft prompt
in front of x. Were the difference H whatever P' is, the gradients with respect to it would be the full model's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offsite_fl.config import check
from offsite_fl.data.examples import IGNORE
from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorMethod, register
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.training import TrainingRun, hold_out, refuse_packed, with_values
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.loss import causal_nll, evaluate_loss, evaluating
from offsite_fl.models.tasks import need_next_token

log = logging.getLogger(__name__)

# Validation batches that adapter gradients are compared on: enough for two digits of a cosine.
COMPARED = 4


@register("loss-margin")
@dataclass(frozen=True)
class LossMargin(EmulatorMethod):
    """Train the emulator until its loss lies a margin above the full model's; never ends farther off than it began.

    LLE of LLEOT (Findings of ACL 2026): minimises the mean over sequences of ``|L_E - L_M - margin|`` in nats a token,
    so that the emulator is a poor model by itself. Runs behind any method that leaves trainable weights, so before
    ``quantize``. ``steps`` batches of the calibration text, each one step of AdamW with gradients clipped to norm 1, at
    a rate that falls from ``lr`` to 0.

    ``prompt`` random vectors, drawn anew for every sequence and step, stand in front of the text (which loses as many
    tokens at its end, so that it fits); the same ones for both models. Their entries are normal with a standard
    deviation of ``scale`` times that of the embedded text or, with ``unit=absolute``, of ``scale`` itself: the paper's
    are ``prompt=5,scale=20,unit=absolute``, which in most models is far outside what embeddings are. ``prompt=0``
    trains on the text alone.

    Every ``eval_every`` steps the objective is measured on the validation text (or the calibration text held out for
    it), and the best weights come out, those that came in among them. A note says where the loss and the direction of
    the adapter's gradients ended. Where the context has a ``workdir`` it resumes from its last measurement.
    """

    margin: float = 4.0
    steps: int = 200
    lr: float = 1e-5
    prompt: int = 5
    scale: float = 1.0
    unit: Literal["embedding", "absolute"] = "embedding"
    eval_every: int = 25

    clip = 1.0
    weight_decay = 0.0

    def __post_init__(self) -> None:
        check(self.margin >= 0, f"loss-margin margin = {self.margin!r} nats can't be negative")
        for name in ("steps", "eval_every"):
            check(getattr(self, name) >= 1, f"loss-margin {name} must be at least 1, got {getattr(self, name)}")
        check(self.lr > 0, f"loss-margin lr = {self.lr!r} must be above 0")
        check(self.prompt >= 0, f"loss-margin prompt = {self.prompt} can't be negative; 0 means none")
        check(self.scale >= 0, f"loss-margin scale = {self.scale!r} can't be negative")

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Train copies of ``emulator``'s blocks and return the best of them in the dtypes they came in.

        ``EmulatorError`` without calibration text, with a quantised block, or if the loss stops being a number.
        """
        need_next_token(context.model)
        calibration = context.need_calibration("loss-margin")
        refuse_packed(emulator, self.name)
        train, validation = hold_out(calibration, context, self.name)
        raised = with_values(emulator, _Run(self, emulator, context, train, validation).run())
        note = self._outcome(emulator, raised, context, validation[:COMPARED])
        log.info(note)
        return replace(raised, notes=(note,))

    def rate(self, step: int) -> float:
        """Learning rate of the step with index ``step``, falling linearly.

        >>> [LossMargin(steps=4, lr=1.0).rate(step) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        """
        return self.lr * (1 - step / self.steps)

    def _outcome(self, before: Emulator, after: Emulator, context: Context, text: Sequence[Batch]) -> str:
        full = full_gradients(context, text)
        old, new = (match_gradients(emulator_gradients(e, context, text), full).cosine for e in (before, after))
        loss, goal = (evaluate_loss(net, text).loss for net in (emulated_network(after, context), context.model))
        return (
            f"loss-margin: the emulator's loss is {loss:.2f}, {loss - goal:+.2f} from the full model's {goal:.2f} "
            f"(asked for: {self.margin:+g}); the adapter's gradients have cosine {new:.3f} with the full model's, "
            f"{old:.3f} before"
        )


def sequence_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token loss in nats of each sequence of ``batch`` [B, ...], with gradient: [sequences that have one]."""
    losses = []
    for row in range(len(batch["labels"])):
        nats, tokens = causal_nll(model, {name: value[row : row + 1] for name, value in batch.items()})
        if tokens:
            losses.append(nats / tokens)
    return torch.stack(losses) if losses else batch["labels"].new_zeros(0, dtype=torch.float32)


def with_prompt(batch: Batch, model: nn.Module, prompt: int, scale: float, unit: str, seed: int) -> Batch:
    """``batch`` as ``inputs_embeds`` behind ``prompt`` random vectors a sequence; as long as before, cut at the end.

    The vectors are normal, their size as :class:`LossMargin` says. Only what the text predicts of itself counts, so
    neither the prompt nor the first token is a target.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each [B, T], on the device of ``model``.
        model: whose input embeddings are used.
        prompt: number of vectors, below T - 1.
        scale: see :class:`LossMargin`, as is ``unit``.
        seed: of the vectors.
    """
    rows, length = batch["input_ids"].shape
    if length < prompt + 2:
        raise EmulatorError(f"loss-margin: a prompt of {prompt} leaves nothing to predict of {length} tokens")
    kept = length - prompt
    any_model: Any = model
    text = any_model.get_input_embeddings()(batch["input_ids"][:, :kept]).detach()
    mask = batch["attention_mask"][:, :kept]
    size = scale * (float(text[mask.bool()].float().std()) if unit == "embedding" else 1.0)
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn = torch.randn(rows, prompt, text.shape[-1], generator=generator).to(text) * size
    labels = batch["labels"][:, :kept].clone()
    labels[:, 0] = IGNORE
    return {
        "inputs_embeds": torch.cat([drawn, text], dim=1),
        "attention_mask": torch.cat([mask.new_ones(rows, prompt), mask], dim=1),
        "labels": torch.cat([labels.new_full((rows, prompt), IGNORE), labels], dim=1),
    }


@dataclass
class _Run(TrainingRun[LossMargin]):
    """One run; ``goals`` are the losses that the validation sequences should have."""

    goals: list[Tensor] = field(init=False, default_factory=list)

    def _loss(self, batch: Batch) -> Tensor:
        prompted = self._prompted(batch, self.step + 1)
        gaps = self._losses(prompted) - self._goal(prompted)
        return gaps.abs().mean() if len(gaps) else gaps.sum()

    @torch.no_grad()
    def _measure(self) -> float:
        """The objective on the validation batches, behind the same prompts every time; lower is better."""
        prompted = [self._prompted(self._moved(b), -number) for number, b in enumerate(self.validation)]
        self.goals = self.goals or [self._goal(batch) for batch in prompted]
        gaps = [self._losses(batch) - goal for batch, goal in zip(prompted, self.goals, strict=True)]
        return torch.cat(gaps).abs().mean().item()

    def _prompted(self, batch: Batch, number: int) -> Batch:
        options = self.options
        if not options.prompt:
            return batch
        seed = self.context.seed * 1_000_003 + number
        return with_prompt(batch, self.student.network, options.prompt, options.scale, options.unit, seed)

    def _losses(self, batch: Batch) -> Tensor:
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=self.student.reduced):
            return sequence_losses(self.student.network, batch)

    @torch.no_grad()
    def _goal(self, batch: Batch) -> Tensor:
        model = self.context.model
        device = next(model.parameters()).device
        with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=self.student.reduced):
            losses = sequence_losses(model, {name: value.to(device) for name, value in batch.items()})
        return losses.to(self.student.device) + self.options.margin
