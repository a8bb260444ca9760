"""The model owner's side of FedBiOT: train LoRA factors on the emulator towards the full model, on public text."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.alignment.losses import cosine_error, kl_of_logits
from offsite_fl.alignment.options import AlignmentOptions
from offsite_fl.alignment.pairs import paired
from offsite_fl.alignment.passes import passed
from offsite_fl.bundle import Bundle
from offsite_fl.data.examples import to_examples
from offsite_fl.data.fingerprints import Fingerprints, fingerprints
from offsite_fl.data.loader import Batch, SeededOrder, pad_batch, pad_id_of
from offsite_fl.data.sources import Source
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators.distill import relative_error
from offsite_fl.errors import OffsiteError, UpdateError
from offsite_fl.evaluation.loss import causal_nll, evaluating
from offsite_fl.models.tasks import need_next_token
from offsite_fl.owner import ModelOwner
from offsite_fl.patch import Patch
from offsite_fl.tuning.emulator_lora import EmulatorLora
from offsite_fl.tuning.optimizer import make_optimizer


@dataclass(frozen=True)
class Stepped:
    """What some alignment steps came to: how many, and the loss of the first and the last batch."""

    steps: int
    first: float
    last: float


class Diverged(OffsiteError):
    """A number of the alignment isn't finite. Factors, optimiser and step are as they were before the call."""


class Aligner:
    """FedBiOT's lower-level problem (arXiv 2406.17706) on LoRA factors of the emulator, a few steps at a time.

    With the current adapter A in both networks, a step lowers
    ``||h - h*||^2 / ||h*||^2 + lambda_kl * KL(M(A u E*; x) || M(A u E; x))``: h is the hidden state behind the emulator
    E, h* the one behind the full middle E*, both over the tokens that aren't padding; the second term compares what the
    whole networks predict next. ``options.hidden`` puts another error in the place of the first term. A stays as it is,
    and so do the emulator's own weights: what is learned lies in the factors, which :attr:`patch` hands over.

    A step takes one forward pass of the full model and one of the emulated network. Batches go on from call to call
    through the public examples, each epoch in another order; the optimiser goes on too, so its state belongs to
    :meth:`state_dict`. No dropout.

    Args:
        owner: holds the full model; its model is as before after each call.
        public: text of nobody's private data, a file or ``datasets.Dataset``.
        options: see :class:`AlignmentOptions`.
        bundle: the one that was handed out; None takes the owner's last.
    """

    def __init__(
        self,
        owner: ModelOwner,
        public: Source,
        options: AlignmentOptions | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        found = bundle or owner.bundle
        if found is None:
            raise UpdateError("there is no emulator to align: call make_bundle() or use_bundle() first")
        need_next_token(owner.model)  # the divergence is one of next-token predictions
        self.owner, self.options = owner, options or AlignmentOptions()
        self.step = 0
        self._patch: tuple[int, Patch] | None = None
        self.examples = to_examples(public, owner.tokenizer, block_size=self.options.block_size)
        self.pad_id = pad_id_of(owner.tokenizer)
        self._emulated = DataOwner.open(found, "float32")
        self.network = self._emulated.model.requires_grad_(False)
        self.device = next(owner.model.parameters()).device
        self.factors = EmulatorLora(self.network, self._emulated.plan, self.options.lora, self.options.seed)
        self.network.to(self.device)
        self.factors.to(self.device)
        for parameter in self.factors.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(self.network, self.factors.parameters, self.options.tuning)
        self._pairs = paired(owner, found, self.network, self.options.hidden)

    @property
    def patch(self) -> Patch:
        """The factors as they are now, to be handed to the data owners."""
        if self._patch is None or self._patch[0] != self.step:
            made = Patch(self.factors.tensors(), self._emulated.bundle.digest, self.options.lora)
            self._patch = self.step, made
        return self._patch[1]

    def public(self) -> Fingerprints:
        """Fingerprints of the public examples, by which a data owner finds out that it holds one of them."""
        return fingerprints(self.examples)

    def align(self, adapter: Mapping[str, Tensor], steps: int) -> Stepped:
        """Take ``steps`` steps with the ``adapter`` (full values by slot name) in both networks.

        The adapter is put in once, not for each batch. ``Diverged`` names the step where a number isn't finite.
        """
        self._emulated.load_adapter(adapter)
        before = copy.deepcopy(self.state_dict())
        losses = []
        try:
            with self.owner.plugged_in(adapter) as full, evaluating(full):
                for _ in range(steps):
                    losses.append(self._step(full))
        except Diverged:
            self._put_back(before)
            raise
        return Stepped(len(losses), losses[0] if losses else math.nan, losses[-1] if losses else math.nan)

    def _step(self, full: nn.Module) -> float:
        loss = self.loss(full, self._batch(self.step))
        self._must_be_finite(loss.item(), "loss")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.factors.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.clip_norm or math.inf)
        self._must_be_finite(float(norm), "gradient norm")
        self.optimizer.step()
        for name, parameter in self.factors.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise self._diverged("a value of " + name, "not finite")
        self.step += 1
        return loss.item()

    def check(self, adapter: Mapping[str, Tensor]) -> None:
        """``Diverged`` if the next batch gives no finite loss with the ``adapter`` (full values) in both networks.

        Both the emulated network's own loss on the text and the alignment's, whose hidden states may lie before the
        adapter. Costs two forward passes of the emulated network and one of the full model.
        """
        self._emulated.load_adapter(adapter)
        batch = self._batch(self.step)
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with self.owner.plugged_in(adapter) as full, evaluating(full), evaluating(self.network), torch.no_grad():
            own = causal_nll(self.network, moved)[0].item()
            found = self.loss(full, batch).item()
        for value, what in ((own, "the emulator's loss on public text"), (found, "the alignment's loss")):
            if not math.isfinite(value):
                raise Diverged(f"{what} is {value} with it")

    def loss(self, full: nn.Module, batch: Batch) -> Tensor:
        """The loss on one batch, a scalar with gradient; ``full`` is the full model with the adapter plugged in."""
        with_logits = self.options.lambda_kl > 0
        blocks_full, blocks_emulated = zip(*self._pairs, strict=True)
        device = next(full.parameters()).device
        with torch.no_grad():
            goal = passed(full, blocks_full, {n: t.to(device) for n, t in batch.items()}, logits=with_logits)
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        got = passed(self.network, blocks_emulated, moved, logits=with_logits)
        mask = moved["attention_mask"]
        errors = [self._hidden(a.to(self.device), b, mask) for a, b in zip(goal[0], got[0], strict=True)]
        loss = errors[0] if len(errors) == 1 else torch.stack(errors).sum()
        if goal[1] is not None and got[1] is not None:
            apart = kl_of_logits(goal[1].to(self.device), got[1], mask, self.options.kl_temperature)
            loss = loss + self.options.lambda_kl * apart
        return loss

    def _hidden(self, goal: Tensor, got: Tensor, mask: Tensor) -> Tensor:
        if self.options.hidden == "cosine":
            return cosine_error(goal, got, mask)
        error, size = relative_error(goal, got, mask)
        return error / size

    def _batch(self, step: int) -> Batch:
        """The batch of a step: it follows from the step's number alone."""
        count, size = len(self.examples), self.options.batch_size
        epoch, place = divmod(step, math.ceil(count / size))
        order = SeededOrder(count, True, self.options.seed)
        order.epoch = epoch
        rows = list(order)[place * size : (place + 1) * size]
        return pad_batch([self.examples[row] for row in rows], self.pad_id)

    def _must_be_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise self._diverged(what, str(value))

    def _diverged(self, what: str, value: str) -> Diverged:
        return Diverged(
            f"{what} is {value} in step {self.step + 1} of the alignment; lower its lr (now {self.options.lr:g})"
        )

    def _put_back(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.factors.parameters.items():
                parameter.copy_(state["factors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self._patch = state["step"], None

    # To go on later --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step, factors and the optimiser's state, as plain data and tensors."""
        return {"step": self.step, "factors": self.factors.tensors(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, made with the same options, bundle and text."""
        self.factors.load(state["factors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self._patch = int(state["step"]), None
