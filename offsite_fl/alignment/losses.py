"""What tells the emulated network from the full one: its hidden states, and what it predicts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of logits that are turned into fp32 probabilities at a time, in elements.
_CHUNK = 2**24


def cosine_error(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine of two hidden states, the mean over the tokens that ``mask`` keeps; from 0 to 2.

    The states are ``[B, T, hidden]``, the mask is ``[B, T]``; computed in fp32. The option ``cos`` of FedBiOT's public
    code (arXiv 2406.17706), which forgets the mean; the one is added so that equal states give 0.

    >>> t, s = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[[8.0, 6.0], [0.0, 1.0]]])
    >>> round(cosine_error(t, s, torch.tensor([[1, 0]])).item(), 4)  # 1 - (24 + 24) / (5 * 10)
    0.04
    """
    kept = mask.bool()
    cosines = F.cosine_similarity(teacher[kept].float(), student[kept].float(), dim=-1)
    return (1 - cosines).sum() / max(1, len(cosines))


def kl_of_logits(teacher: Tensor, student: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(teacher || student)`` of the next-token distributions, in nats, the mean over the tokens ``mask`` keeps.

    Logits are ``[B, T, vocabulary]``, the mask is ``[B, T]``; computed in fp32. FedBiOT (arXiv 2406.17706, the second
    term of the lower-level problem); its public code counts padding too. Both logits are divided by a ``temperature``
    t and the divergence is multiplied by t^2, which leaves the gradient's size where it was (Hinton et al. 2015, arXiv
    1503.02531, section 2).

    >>> t = torch.log(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).clamp_min(1e-30))
    >>> s = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))
    >>> round(kl_of_logits(t, s, torch.tensor([[1, 0]])).item(), 4)  # 0.5 ln 2 + 0.5 ln (2 / 3)
    0.1438
    """
    kept = mask.bool()
    goal, got = teacher[kept], student[kept]
    total = torch.zeros((), device=got.device)
    rows = max(1, _CHUNK // max(1, got.shape[-1]))
    for start in range(0, len(got), rows):
        log_p = (goal[start : start + rows].to(got.device).float() / temperature).log_softmax(-1)
        log_q = (got[start : start + rows].float() / temperature).log_softmax(-1)
        total = total + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return temperature**2 * total / max(1, len(got))
