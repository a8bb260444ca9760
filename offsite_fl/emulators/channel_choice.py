"""Selective channel pruning of GradOT (arXiv 2507.04455): what the inner channels of an MLP cost to take out.

Without channel c the row ``w_up,c`` (and that of the gate) and the column ``w_dn,c`` are gone, which scores
``||G_up[:, c]||_1 ||A_up w_up,c||_1 + ||G_dn w_dn,c||_1 ||A_dn[:, c]||_1`` and ``lam`` times ``g . w`` of the rows and
the column (:mod:`offsite_fl.emulators.gcs`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.gcs import Candidates
from offsite_fl.emulators.kfac import Moments
from offsite_fl.models.linears import linear_weight


def channel_candidates(block: nn.Module, chain: ChannelChain, moments: Mapping[str, tuple[Moments, ...]]) -> Candidates:
    """Every channel of ``chain`` as a candidate for taking out.

    ``moments`` has ``chain.parts`` entries for each reader: the halves of a fused gate and up count as two matrices.
    """
    pairs = []
    slopes = torch.zeros(chain.width, device=linear_weight(block.get_submodule(chain.writer)).device)
    for path in chain.readers:
        halves = _weight(block, path).chunk(chain.parts)
        for rows, seen in zip(halves, moments[path], strict=True):
            pairs.append((seen.outputs, seen.inputs @ rows.T))
            slopes = slopes + (seen.gradient * rows).sum(1)
    columns, (seen,) = _weight(block, chain.writer), moments[chain.writer]
    pairs.append((seen.outputs @ columns, seen.inputs))
    return Candidates(tuple(pairs), slopes + (seen.gradient * columns).sum(0))


def _weight(block: nn.Module, path: str) -> Tensor:
    return linear_weight(block.get_submodule(path)).detach().float()
