"""How far a reply lies from what was sent, and a reply drawn back to a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def update_norm(tensors: Tensors, sent: Tensors) -> float:
    """L2 norm of ``tensors - sent`` over all tensors together, summed in fp64."""
    return math.sqrt(sum(float((t.double() - sent[name].double()).square().sum()) for name, t in tensors.items()))


def clipped(tensors: Tensors, sent: Tensors, norm: float, bound: float) -> dict[str, torch.Tensor]:
    """The reply whose update has been scaled down to ``bound``: ``sent + (tensors - sent) / max(1, norm / bound)``.

    Norm bounding of Sun et al. 2019, "Can You Really Backdoor Federated Learning?" (arXiv 1911.07963, section 4).
    ``norm`` is :func:`update_norm` of the two. fp32 in and out; a reply within the bound comes back as it is.
    """
    if norm <= bound:
        return dict(tensors)
    return scaled(tensors, sent, bound / norm)


def scaled(tensors: Tensors, sent: Tensors, factor: float) -> dict[str, torch.Tensor]:
    """The reply with ``factor`` times the update, ``sent + factor * (tensors - sent)``; fp32 in and out."""
    return {
        name: (sent[name].double() + factor * (tensor.double() - sent[name].double())).float()
        for name, tensor in tensors.items()
    }
