"""The next-token loss, for tuning and for measuring, without holding the logits of a whole batch in memory.

With a vocabulary of 49,152 the logits of 1,024 tokens are 200 MB, and a plain cross entropy holds them three times.
Where the head is a plain linear layer, :func:`causal_nll` goes over the tokens in chunks and computes the gradient of
each chunk while its logits are at hand, so that the peak is one chunk.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from offsite_fl.data.examples import IGNORE
from offsite_fl.errors import DataError
from offsite_fl.models.tasks import need_next_token

Batch = Mapping[str, Tensor]

# fp32 logits held at a time, in elements: 64 MB on a CPU, where bigger chunks fall out of the cache; 512 MB on a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**24}
_CHUNK_ELEMENTS_GPU = 2**27

# model -> (its head when it was probed, whether logits are exactly head(last hidden state))
_PROBED: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], bool]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LossResult:
    """Mean loss in nats per predicted token over ``tokens`` tokens; of a classifier both count examples."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinity where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def causal_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the next-token loss of a batch, and how many tokens were predicted.

    Parameters
    ----------
    model
        A causal language model with the signature of Hugging Face.
    batch
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]`` int64 on the model's device. Position ``t``
        predicts ``labels[:, t + 1]``; a label of -100 counts for nothing.

    Returns
    -------
    The sum in nats as a scalar fp32 tensor with gradient, and the number of predicted tokens. ``ModelError`` if the
    model is one of transformers' for another task (a classifier, an encoder with a decoder).
    """
    need_next_token(model)
    targets = batch["labels"][:, 1:].reshape(-1)
    kept = (targets != IGNORE).nonzero().squeeze(-1)
    targets = targets[kept]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = plain_head(model)
    if head is None:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return _sum_nll(logits.flatten(0, 1)[kept], targets), len(targets)
    hidden = _base(model)(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return _linear_nll(hidden.flatten(0, 1)[kept], head.weight, head.bias, targets), len(targets)


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str | None = None,
    progress: bool = False,
    nll: Callable[[nn.Module, Batch], tuple[Tensor, int]] = causal_nll,
) -> LossResult:
    """Mean loss over ``batches``, each token (or example) weighing the same; the model's mode is restored afterwards.

    ``device=None`` uses the device of the model's first parameter. ``nll`` gives the sum of a batch and over how many
    it goes: of next tokens, or what :func:`offsite_fl.evaluation.objective.objective_of` says. ``DataError`` if there
    is nothing to predict.
    """
    device = device if device is not None else next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in track(batches, "evaluating", disable=not progress, transient=True):
            nats, count = nll(model, {name: value.to(device) for name, value in batch.items()})
            total += nats.double().item()
            tokens += count
    if tokens == 0:
        raise DataError("there is no token to predict in the evaluation data; give at least one example with an answer")
    return LossResult(total / tokens, tokens)


@torch.no_grad()
def token_log_probabilities(model: nn.Module, inputs: Batch, rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability in nats that ``model`` gives ``tokens[i]`` right after ``inputs[rows[i], :positions[i] + 1]``.

    Like :func:`causal_nll` it never holds the logits of a whole batch: the head runs on the positions asked for only,
    on each of them once.

    Parameters
    ----------
    inputs
        ``input_ids`` and ``attention_mask``, ``[B, T]`` int64 on the model's device.
    rows, positions, tokens
        ``[N]`` int64 on the same device. Several tokens may be asked for at one position.

    Returns
    -------
    ``[N]`` fp32. ``ModelError`` if the model is one for another task.
    """
    need_next_token(model)
    head = plain_head(model)
    places, back = torch.unique(torch.stack((rows, positions)), dim=1, return_inverse=True)
    if head is None:
        read = model(**inputs, use_cache=False).logits[places[0], places[1]]
    else:
        read = _base(model)(**inputs, use_cache=False).last_hidden_state[places[0], places[1]]
    found = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    size = _chunk(read, read.shape[-1] if head is None else head.out_features)
    for start in range(0, len(read), size):
        part = read[start : start + size]
        logits = (part if head is None else head(part)).float()
        asked = ((back >= start) & (back < start + size)).nonzero().squeeze(-1)
        at = back[asked] - start
        found[asked] = logits[at, tokens[asked]] - logits.logsumexp(-1)[at]
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in evaluation mode, and in its own again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's output layer if its logits are exactly that layer applied to the base model's last hidden state.

    None for every other model (logits capped or scaled, wrapped models), which then pays for full logits. Found out
    by running the model once on four tokens.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if type(head) is not nn.Linear or head._forward_hooks:
        return None
    if not all(getattr(hook, "casts_only", False) for hook in head._forward_pre_hooks.values()):
        return None
    known = _PROBED.get(model)
    if known is None or known[0]() is not head:
        known = (weakref.ref(head), _base(model) is not model and _logits_are_plain(model, head))
        _PROBED[model] = known
    return head if known[1] else None


def _base(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


@torch.no_grad()
def _logits_are_plain(model: nn.Module, head: nn.Linear) -> bool:
    """Replace what the head returns by large numbers and see whether they come out of the model unchanged.

    Large, because a soft cap (``30 * tanh(x / 30)``) can't be seen on the small logits of a young model.
    """
    seen: dict[str, Any] = {}

    def on_base(module: nn.Module, args: Any, output: Any) -> None:
        seen["base"] = getattr(output, "last_hidden_state", None)

    def on_head(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["head"] = args[0]
        probe = (output.float() / output.float().abs().max().clamp_min(1e-20) * 1000).to(output.dtype)
        seen["probe"] = probe
        return probe

    hooks = [_base(model).register_forward_hook(on_base), head.register_forward_hook(on_head)]
    try:
        with evaluating(model):
            ids = torch.arange(1, 5, device=head.weight.device)[None] % head.out_features
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    base, given, probe = (seen.get(name) for name in ("base", "head", "probe"))
    if base is None or given is None or probe is None or base.shape != given.shape or logits.shape != probe.shape:
        return False
    return bool(torch.equal(base.to(given.dtype), given) and torch.equal(logits.float(), probe.float()))


def _chunk(rows_of: Tensor, vocabulary: int) -> int:
    return max(32, _CHUNK_ELEMENTS.get(rows_of.device.type, _CHUNK_ELEMENTS_GPU) // vocabulary)


def _sum_nll(logits: Tensor, targets: Tensor) -> Tensor:
    total = logits.new_zeros((), dtype=torch.float32)
    size = _chunk(logits, logits.shape[-1])
    for start in range(0, len(targets), size):
        rows = logits[start : start + size].float()
        total = total + F.cross_entropy(rows, targets[start : start + size], reduction="sum")
    return total


def _linear_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        total: Tensor = _LinearNll.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
        return total
    return _nll_and_gradients(hidden, weight, bias, targets, (False, False, False))[0]


class _LinearNll(torch.autograd.Function):
    """Cross entropy of a linear layer, its gradients computed in the forward pass while the logits are there.

    The result is a sum, so the backward pass only scales what was stored: a hidden-sized tensor and, where the head
    is trained, a weight-sized one.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        total, *gradients = _nll_and_gradients(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.gradients = gradients
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (*((None if g is None else g * scale.to(g.dtype)) for g in ctx.gradients), None)


def _nll_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    matrix = weight.to(dtype)  # once, not in every chunk
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
    size = _chunk(hidden, weight.shape[0])
    with torch.autocast(device, enabled=False):
        for start in range(0, len(targets), size):
            rows, goal = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            logits = F.linear(rows, matrix, None if bias is None else bias.to(dtype)).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(-1, goal)).sum()
            if not any(wanted):
                continue
            slope = logits.sub_(norm).exp_()  # softmax, in place
            slope.scatter_add_(-1, goal, torch.full_like(norm, -1.0))
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(dtype)
            if d_hidden is not None:
                d_hidden[start : start + size] = slope @ matrix
            if d_weight is not None:
                d_weight += slope.T @ rows
    return (
        total,
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )
