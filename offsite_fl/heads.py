"""A first head for a classifier, from a few labelled public examples: without one, zero-shot accuracy means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import Batch
from offsite_fl.errors import DataError, ModelError
from offsite_fl.evaluation.classification import class_logits
from offsite_fl.evaluation.loss import evaluating

# Nats by which the logit at one class's mean exceeds another's, on average and at most.
MARGIN = 8.0


def nearest_class_mean_head(
    model: Any, batches: Sequence[Batch], head: Sequence[str], scale: float | None = None
) -> None:
    """Set the linear layer that gives the logits to the nearest-class-mean classifier of the features that enter it.

    With x the features, mu_k the mean of those of class k and s a scale,

        -s |x - mu_k|^2  =  (2 s mu_k) . x  -  s |mu_k|^2  -  s |x|^2,

    and the last term is the same for all classes. So W_k = 2 s mu_k and b_k = -s |mu_k|^2 give the class whose mean is
    nearest (Mensink et al. 2013, "Distance-Based Image Classification", with the identity as metric), and s says
    how sure of it the softmax is. ``scale=None`` takes s = 1 / v, with v the mean squared distance of an example to
    the mean of its own class (of N examples in K classes, the sum over N - K): a class whose mean is farther by as much
    has a logit lower by 1. But v is at least an eighth of the mean squared distance between two means: of classes
    that lie far apart the softmax would be so sure that no gradient were left to begin with.

    Parameters
    ----------
    model
        A classifier; only that layer changes, in place.
    batches
        Labelled examples, at least one of each class, as ``make_loader`` gives them.
    head
        Paths of the head's parameters, among which the layer is looked for.

    Raises
    ------
    ModelError
        If the head has no such layer, or that has no bias, which the distances need.
    DataError
        If a class has no example.
    """
    layer = _last_linear(model, head)
    features, labels = _features(model, layer, batches)
    count = layer.out_features
    missing = sorted(set(range(count)) - set(labels.tolist()))
    if missing:
        name = Classes.of_config(model.config).names[missing[0]]
        raise DataError(f"no example of class {name!r}: a nearest-class-mean head needs at least one of each class")
    means = torch.stack([features[labels == k].mean(0) for k in range(count)])
    s = 1 / _spread(features, labels, means) if scale is None else scale
    with torch.no_grad():
        layer.weight.copy_(2 * s * means)
        layer.bias.copy_(-s * means.square().sum(-1))


def _spread(features: Tensor, labels: Tensor, means: Tensor) -> float:
    """The squared distance that counts as one nat; see :func:`nearest_class_mean_head`."""
    spare = len(features) - len(means)
    within = (features - means[labels]).square().sum() / max(1, spare)
    apart = torch.cdist(means, means).square().sum() / (len(means) * (len(means) - 1))
    found = max(float(within), float(apart) / MARGIN)
    if found <= 0:
        raise DataError("the features of all examples are the same: a nearest-class-mean head can't tell classes apart")
    return found


def _last_linear(model: Any, head: Sequence[str]) -> nn.Linear:
    count = len(Classes.of_config(model.config))
    paths = {path.rpartition(".")[0] for path in head}
    found = [m for m in (model.get_submodule(path) for path in sorted(paths)) if isinstance(m, nn.Linear)]
    last = [layer for layer in found if layer.out_features == count]
    if len(last) != 1:
        raise ModelError(f"{type(model).__name__}'s head {list(head)} has no single linear layer of {count} outputs")
    if last[0].bias is None:
        raise ModelError(
            f"the last layer of {type(model).__name__}'s head has no bias, so it can't be a nearest-class-mean head: "
            "begin with a head that was tuned on public examples"
        )
    return last[0]


@torch.no_grad()
def _features(model: nn.Module, layer: nn.Linear, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """What enters ``layer`` for each example [N, features] in fp64, and its class [N]."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(args[0].double().cpu())
        given.append(output.float().cpu())

    given: list[Tensor] = []
    device, labels = layer.weight.device, []
    handle = layer.register_forward_hook(note)
    try:
        with evaluating(model):
            for batch in batches:
                logits = class_logits(model, {name: value.to(device) for name, value in batch.items()}).cpu()
                if logits.shape != given[-1].shape or not torch.equal(logits, given[-1]):
                    raise ModelError(f"the logits of {type(model).__name__} aren't what its last linear layer gives")
                labels.append(batch["labels"].cpu())
    finally:
        handle.remove()
    if not seen:
        raise DataError("there is no example to make a head from; give at least one of each class")
    return torch.cat(seen), torch.cat(labels)
